"""Nothing of ours reads what may run code when it is read, and no test data is such."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
# Modules that make objects, and so run code, out of bytes; and calls that run a text.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}
SWITCHES = {"allow_pickle", "trust_remote_code"}
FOLDERS = ("salt_jax", "tasks", "benchmarks", "launch", "tests", "gin", "docs")
# numpy.load takes allow_pickle as its third argument, too.
NUMPY = {"np.load", "numpy.load"}


def findings(text: str) -> list[str]:
    """What a Python text imports or calls of the above."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] * (node.module.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in CALLS | METHODS or (name in NUMPY and len(node.args) > 2))
            switches = [k for k in node.keywords if k.arg in SWITCHES]
            found += [str(k.arg) for k in switches if ast.unparse(k.value) != "False"]
    return found


def files() -> list[pathlib.Path]:
    ours = [file for folder in FOLDERS[:4] for file in (ROOT / folder).rglob("*.py")]
    return sorted([*ours, ROOT / "setup.py"])


def test_no_code_out_of_data() -> None:
    found = {str(file.relative_to(ROOT)): findings(file.read_text()) for file in files()}
    assert {name: each for name, each in found.items() if each} == {}


def test_what_is_looked_for_is_found() -> None:
    texts = [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('a')",
        "np.load('a', allow_pickle=True)",
        "np.load('a', None, True)",
        "x.load(allow_pickle=given)",
        "yaml.load('a', Loader=x)",
        "eval('1')",
        "exec(text)",
        "datasets.load_dataset('a', trust_remote_code=True)",
    ]
    assert [text for text in texts if not findings(text)] == []


def test_none_is_kept() -> None:
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"}
    assert not [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
