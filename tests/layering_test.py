"""Imports point one way, and only preparation/ and tasks/ import TensorFlow or SeqIO."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "salt_jax"

# A part may import the parts named here, itself, and the leaves errors and run_folder.
ALLOWED = {
    "main": {"commands", "command_line", "configuration", "config_errors", "processes"}
    | {"data", "mirror", "run_lock", "verb_process"},
    "configuration": {"command_line", "config_errors", "gin_files", "safe_gin", "setting_types"},
    "commands": {"training", "preparation", "planning", "reporting", "distill", "models", "data"}
    | {"evaluation", "verb_process"},
    "training": {"distill", "models", "data"},
    "preparation": {"distill", "models", "data"},
    "evaluation": {"training", "preparation", "distill", "models", "data"},
    "planning": {"training", "distill", "models", "data"},
    "reporting": {"distill", "models", "data"},
    "tasks": {"preparation", "distill", "data"},
    "t5x_model": {"distill"},
    "distill": set(),
    "models": set(),
    "data": set(),
    "command_line": {"processes"},
    "config_errors": {"command_line", "gin_files"},
    "errors": set(),
    "run_folder": {"gin_files", "processes", "run_lock"},
    "processes": set(),
    "mirror": {"data", "run_lock"},
    "run_lock": set(),
    "gin_files": set(),
    "safe_gin": {"command_line", "gin_files"},
    "setting_types": set(),
    "verb_process": set(),
    "__init__": set(),
    "__main__": {"main"},
}
LEAVES = {"errors", "run_folder", "__version__"}
KNOW_GIN = {"main", "configuration", "config_errors", "gin_files", "safe_gin"}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio"}


def files() -> list[pathlib.Path]:
    folders = ("", "[!t]*/", "t*/", "evaluation/*/")
    return sorted(file for folder in folders for file in PACKAGE.glob(f"{folder}*.py"))


def imports(file: pathlib.Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in ("salt_jax", *(f"salt_jax.{part}" for part in ALLOWED)):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: pathlib.Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(file):
        first, *rest = name.split(".")
        if first in TENSORFLOW:
            assert part in ("preparation", "tasks"), f"{file} imports {name}"
        if first in ("lm_eval", "rouge_score"):
            assert part == "evaluation", f"{file} imports {name}"
        if first == "t5x":
            assert part == "t5x_model", f"{file} imports {name}"
        if first == "gin":
            assert part in KNOW_GIN, f"{file} imports gin"
        if first == "salt_jax" and rest:
            assert rest[0] in ALLOWED[part] | LEAVES | {part}, f"{file} imports {name}"


def test_nothing_imports_the_plug_in() -> None:
    """T5X is no requirement."""
    importing = [file for file in files() if "salt_jax.t5x_model" in imports(file)]
    assert not importing


def test_every_part_is_known() -> None:
    assert {f.relative_to(PACKAGE).parts[0].removesuffix(".py") for f in files()} <= set(ALLOWED)


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_readable(file: pathlib.Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 450, "one concept per file"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what goes in and what comes out"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= 64, f"{node.name} has {lines} lines, signature and docstring aside"


def test_no_python_file_under_gin() -> None:
    assert not list((ROOT / "gin").rglob("*.py")), "it would hide the library gin"
