"""Imports point one way, and only preparation/ and tasks/ import TensorFlow or SeqIO."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "salt_jax"

# A part may import the parts named here, itself, and the leaves.
ALLOWED = {
    "main": {"commands", "command_line", "configuration", "config_errors", "processes"}
    | {"data", "mirror", "run_lock", "verb_process"},
    "configuration": {"command_line", "config_errors", "safe_gin", "setting_types"},
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
    "config_errors": {"command_line"},
    "errors": set(),
    "output_streams": set(),
    "run_folder": {"processes", "run_lock"},
    "processes": set(),
    "mirror": {"data", "run_lock"},
    "run_lock": set(),
    "safe_gin": {"command_line"},
    "setting_types": set(),
    "stop_signals": set(),
    "terminal": set(),
    "verb_process": set(),
    "__init__": set(),
    "__main__": {"main"},
}
LEAVES = {"errors", "run_folder", "__version__", "output_streams", "stop_signals", "terminal"}
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


def calls(file: pathlib.Path) -> Iterator[ast.Call]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    yield from (node for node in nodes if isinstance(node, ast.Call))


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
        if first == "rich":
            assert part == "terminal", f"{file} imports {name}: what is printed goes through it"
        if first == "gin":
            assert part in ("main", "configuration", "safe_gin"), f"{file} imports gin"
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


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_what_is_printed_goes_through_one_module(file: pathlib.Path) -> None:
    """It writes out what would steer a terminal in names and texts of anyone's."""
    for call in calls(file):
        if isinstance(call.func, ast.Name) and call.func.id == "print":
            # What is read from main.check's stderr is printed by who has asked.
            assert file.name in ("terminal.py", "main.py"), f"{file}:{call.lineno} prints by itself"


@pytest.mark.parametrize(
    "file",
    [*files(), ROOT / "setup.py", *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tasks/*.py")],
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_no_text_file_depends_on_the_locale(file: pathlib.Path) -> None:
    for call in calls(file):
        where = f"{file}:{call.lineno}"
        named = {keyword.arg for keyword in call.keywords}
        if "encoding" in named:
            continue
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "subprocess":
            assert not named & {"text", "universal_newlines"}, f"{where} text without encoding="
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
            of_ours = isinstance(call.func.value, ast.Name) and call.func.value.id[-6:] == "_files"
            assert of_ours, f"{where} {call.func.attr} without encoding="
        if isinstance(call.func, ast.Name) and call.func.id == "open":
            mode = ast.literal_eval(call.args[1]) if len(call.args) > 1 else "r"
            assert "b" in mode, f"{where} open without encoding="


def test_no_python_file_under_gin() -> None:
    assert not list((ROOT / "gin").rglob("*.py")), "it would hide the library gin"
