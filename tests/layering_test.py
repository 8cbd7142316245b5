"""Imports point one way, and only t5x/ and tasks/ import TensorFlow or SeqIO."""

import ast
import graphlib
import pathlib
from collections import Counter
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "salt_jax"

# A part may import the parts named here, itself, and the leaves. No two name each other.
ALLOWED: dict[str, set[str]] = {
    "__main__": {"main", "runtime"},
    "main": {"cli", "storage", "runtime"},
    "commands": {"cli", "evaluation", "planning", "reporting", "inference", "training"}
    | {"preparation", "huggingface", "distill", "models", "data", "storage", "runtime"},
    "cli": {"storage", "runtime"},
    "evaluation": {"inference", "training", "preparation", "distill", "models", "data", "storage"},
    "planning": {"training", "distill", "models", "data"},
    "reporting": {"evaluation", "distill", "data", "storage"},
    "inference": {"training", "distill", "models", "data", "storage"},
    "training": {"huggingface", "distill", "models", "data", "storage", "runtime"},
    "tasks": {"t5x", "preparation", "distill", "data"},
    "t5x": {"preparation", "distill", "data"},
    "preparation": {"huggingface", "data", "storage", "runtime"},
    "huggingface": {"models", "data", "storage"},
    "data": {"storage"},
    "storage": {"runtime"},
    "runtime": set(),
    "distill": set(),
    "models": set(),
    "errors": set(),
    "terminal": set(),
    "__init__": set(),
}
LEAVES = {"errors", "terminal", "__version__"}
# Libraries that only some parts may import.
LIBRARIES = {
    "tensorflow tensorflow_datasets tensorflow_text seqio": {"t5x", "tasks"},
    "lm_eval rouge_score": {"evaluation"},
    "t5x": {"t5x"},
    "rich": {"terminal"},
    "gin": {"main", "cli", "storage"},
}
IMPORTERS = {name: parts for names, parts in LIBRARIES.items() for name in names.split()}


def files() -> list[pathlib.Path]:
    folders = ("", "[!t]*/", "t*/", "evaluation/*/", "huggingface/*/")
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


def violations(file: pathlib.Path) -> Iterator[str]:
    """What a file imports that its part may not."""
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(file):
        first, *rest = name.split(".")
        allowed = part in IMPORTERS.get(first, {part})
        if first == "salt_jax" and rest:
            allowed = rest[0] in ALLOWED[part] | LEAVES | {part}
        if not allowed:
            yield f"{file.relative_to(PACKAGE)} imports {name}"


def test_imports_point_one_way() -> None:
    assert [found for file in files() for found in violations(file)] == []


def test_no_two_parts_import_each_other() -> None:
    graphlib.TopologicalSorter(ALLOWED).prepare()  # CycleError names them


def test_nothing_imports_the_plug_in() -> None:
    """T5X is no requirement."""
    importing = [file for file in files() if "salt_jax.t5x.t5x_model" in imports(file)]
    assert not importing


def test_every_part_is_known() -> None:
    assert {f.relative_to(PACKAGE).parts[0].removesuffix(".py") for f in files()} <= set(ALLOWED)


def test_no_name_twice() -> None:
    """A name stands for one thing, so that it can be searched for; none differs by an s alone."""
    # A verb, a SeqIO task and a task of lm-eval are named by their modules.
    named = [file for file in files() if file.parent.name not in ("commands", "tasks")]
    modules = [file.stem for file in named if not file.stem.startswith("__")]
    nodes = [n for f in named for n in ast.parse(f.read_text(encoding="utf-8")).body]
    classes = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    for names in (modules, classes, functions):
        public = Counter(name for name in names if not name.startswith("_"))
        twice = [name for name, count in public.items() if count > 1]
        plural = [name for name in public if f"{name}s" in public and names is not functions]
        assert (twice, plural) == ([], [])


def unreadable(file: pathlib.Path) -> Iterator[str]:
    """Where a file is longer than a reader likes."""
    name, text = file.relative_to(PACKAGE), file.read_text(encoding="utf-8")
    if text.count("\n") > 450:
        yield f"{name} has over 450 lines: one concept a file"
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield f"{name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > 64:
                yield f"{name}: {node.name} has {lines} lines, signature and docstring aside"


def test_files_stay_readable() -> None:
    assert [found for file in files() for found in unreadable(file)] == []


def calls(file: pathlib.Path) -> Iterator[ast.Call]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    yield from (node for node in nodes if isinstance(node, ast.Call))


def test_what_is_printed_goes_through_one_module() -> None:
    """It writes out what would steer a terminal in names and texts of anyone's."""
    # What is read from main.check's stderr is printed by who has asked.
    printing = [
        f"{file}:{call.lineno}"
        for file in files()
        if file.name not in ("terminal.py", "main.py")
        for call in calls(file)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert printing == []


def without_encoding(file: pathlib.Path) -> Iterator[str]:
    """Where a file reads or writes text by the locale's encoding."""
    for call in calls(file):
        where = f"{file}:{call.lineno}"
        named = {keyword.arg for keyword in call.keywords}
        if "encoding" in named:
            continue
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "subprocess":
            yield from [where] if named & {"text", "universal_newlines"} else []
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
            of_ours = isinstance(call.func.value, ast.Name) and call.func.value.id[-6:] == "_files"
            yield from [] if of_ours else [where]
        if isinstance(call.func, ast.Name) and call.func.id == "open":
            mode = ast.literal_eval(call.args[1]) if len(call.args) > 1 else "r"
            yield from [] if "b" in mode else [where]


def test_no_text_file_depends_on_the_locale() -> None:
    more = [ROOT / "setup.py", *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tasks/*.py")]
    assert [found for file in [*files(), *more] for found in without_encoding(file)] == []


def test_no_python_file_under_gin() -> None:
    assert not list((ROOT / "gin").rglob("*.py")), "it would hide the library gin"
