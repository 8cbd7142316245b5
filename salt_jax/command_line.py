"""The command line: what was typed, taken apart; and what the command says of itself.

In: argv. Out: Arguments, and the texts of --help, read from the verbs' docstrings without importing
the libraries that they need.
"""

import ast
import inspect
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from salt_jax import processes
from salt_jax.errors import InputError, nearest

COMMANDS = pathlib.Path(__file__).parent / "commands"

_COMMON_FLAGS = ("gin_file", "safe_gin", "output_dir", *processes.FLAGS)

# Set for the commands that a command starts: what they read comes from the same files.
SAFE_GIN = "SALT_SAFE_GIN"
_NO_VALUE = "--{name} needs a value: --{name}=VALUE."
_SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}

USAGE = """\
usage: salt VERB [--gin_file=FILE]… [--gin.NAME=VALUE]… [--SETTING=VALUE]… --output_dir=FOLDER

  --gin_file=FILE     a gin file, found from here or among the package's own (gin/); repeatable,
                      a later file overrides an earlier one
  --safe_gin          read no more than settings of salt_jax's own from gin files: without it, a gin
                      file can run any code by importing it (docs/configuration.md)
  --gin.NAME=VALUE    one setting (train.train.seed=1) or macro (STEPS=500), over the files
  --SETTING=VALUE     a setting of the verb itself: --seed=1 is --gin.VERB.VERB.seed=1
  --output_dir=FOLDER where the verb writes config.gin, run.json, summary.json and its results
  --coordinator_address=HOST:PORT --process_count=N --process_index=I, or --multi_process=True
                      one of several processes (docs/launching.md); the environment may say the
                      same: SALT_PROCESS_INDEX, …
  --help, --version
"""


class Arguments(NamedTuple):
    """A command line, taken apart."""

    verb: str
    gin_files: list[str]
    bindings: list[str]
    settings: dict[str, list[str]]
    positional: list[str]
    output_dir: str
    processes: dict[str, str]
    safe_gin: bool
    help: bool


def verbs() -> list[str]:
    """The verbs: one a file in commands/."""
    return sorted(path.stem for path in COMMANDS.glob("*.py") if not path.stem.startswith("_"))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Takes a command line apart.

    Raises:
      InputError: A flag without its value.
    """
    safe_gin = _switch(os.environ.get(SAFE_GIN) or "0", SAFE_GIN)
    arguments = Arguments(argv[0], [], [], {}, [], "", {}, safe_gin, False)
    rest = iter(argv[1:])
    for argument in rest:
        if argument in ("--help", "-h"):
            arguments = arguments._replace(help=True)
            continue
        if not argument.startswith("--"):
            arguments.positional.append(argument)
            continue
        if argument.partition("=")[0] == "--safe_gin":
            # It can be asked for only: what a file has its commands started with can't undo it.
            typed = _switch(argument.partition("=")[2] or "1", "--safe_gin")
            arguments = arguments._replace(safe_gin=arguments.safe_gin or typed)
            continue
        name, separator, value = argument[2:].partition("=")
        if not separator:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise InputError(_NO_VALUE.format(name=name))
        if name == "gin_file":
            if not value:
                raise InputError("--gin_file names no file: --gin_file=FILE.")
            arguments.gin_files.append(value)
        elif name.startswith("gin."):
            arguments.bindings.append(f"{name.removeprefix('gin.')} = {value}")
        elif name == "output_dir":
            arguments = arguments._replace(output_dir=value)
        elif name in processes.FLAGS:
            arguments.processes[name] = value
        else:
            arguments.settings.setdefault(name, []).append(value)
    return arguments


def _switch(value: str, name: str) -> bool:
    if value not in _SWITCH:
        raise InputError(f"{name} is {value!r}, expected True or False: correct it.")
    return _SWITCH[value]


def own_bindings(function: Callable[..., None], arguments: Arguments) -> list[str]:
    """The bindings that --SETTING=VALUE flags and positional arguments stand for.

    Raises:
      InputError: No such setting, or one without its value.
    """
    parameters = parameters_of(function)
    settings = dict(arguments.settings)
    if arguments.positional:
        module = sys.modules[function.__module__]
        name = getattr(module, "POSITIONAL", None)
        if name is None:
            raise InputError(
                f"`salt {arguments.verb}` takes no argument {arguments.positional[0]!r}: "
                "settings are written --NAME=VALUE."
            )
        settings[name] = [*settings.get(name, []), *arguments.positional]
    bindings = []
    for name, values in settings.items():
        require_known("setting", name, [*parameters, *_COMMON_FLAGS], prefix="--")
        annotation = str(parameters[name].annotation)
        may_be_empty = "Sequence[str]" in annotation and not annotation.startswith("str |")
        if "" in values and not (may_be_empty or isinstance(parameters[name].default, str)):
            raise InputError(_NO_VALUE.format(name=name))
        # "str | Sequence[str]" is a list from the second value on.
        is_one = annotation.startswith("str |") and len(values) == 1
        is_list = "Sequence" in annotation and not is_one and "Mapping[" not in annotation
        if "bool" in annotation:
            values = [v.capitalize() if v.lower() in ("true", "false") else v for v in values]
        literals = [repr(v) if _is_text(v, annotation) else v for v in values]
        is_whole = len(literals) == 1 and literals[0].startswith(("(", "["))
        literal = f"({', '.join(literals)},)" if is_list and not is_whole else literals[-1]
        bindings.append(f"{arguments.verb}.{arguments.verb}.{name} = {literal}")
    return bindings


def _is_text(value: str, annotation: str) -> bool:
    """Whether a flag's value stands for itself, and is no Python literal or gin reference."""
    if re.match(r"[@%][A-Za-z_]", value) or value == "None":
        return False
    if "str" in annotation and "Mapping[" not in annotation:
        return True
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return True
    return False


def parameters_of(function: Callable[..., None]) -> Mapping[str, inspect.Parameter]:
    """The settings of a verb's function."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def verb_table() -> str:
    """A line for each verb."""
    lines = []
    for verb in verbs():
        tree = ast.parse((COMMANDS / f"{verb}.py").read_text(encoding="utf-8"))
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines.append(f"  {verb:10} {first.partition(': ')[2] or first}\n")
    return "".join(lines) + "\n`salt VERB --help` lists a verb's settings.\n"


def verb_help(verb: str) -> str:
    """What a verb does and its settings, read without importing its libraries."""
    tree = ast.parse((COMMANDS / f"{verb}.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == verb)
    text, _, rest = (ast.get_docstring(function) or "").partition("\nArgs:\n")
    explained = _explained(rest)
    about = (ast.get_docstring(tree) or "").partition("\n")[2]
    lines = [f"salt {verb}: {text.strip()}", about, "", "Settings:"]
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        value = "required" if default is None else f"default {ast.unparse(default)}"
        lines.append(f"  --{argument.arg}: {kind} ({value})")
        words = textwrap.wrap(explained[argument.arg], 94, break_on_hyphens=False)
        lines += textwrap.indent("\n".join(words), " " * 6).splitlines()
    return "\n".join([*lines, "", USAGE])


def _explained(arguments: str) -> dict[str, str]:
    """The arguments of a docstring by name, from the part that begins with the first."""
    explained: dict[str, str] = {}
    for line in arguments.partition("\n\n")[0].splitlines():
        if start := re.match(r"  (\w+): (.*)", line):
            name, explained[start[1]] = start.groups()
        else:
            explained[name] += f" {line.strip()}"
    return explained


def require_known(
    kind: str, name: str, known: Iterable[str], prefix: str = "", where: str = ""
) -> None:
    """Raises InputError, with the nearest valid name, unless `name` is known."""
    known = sorted(known)
    if name not in known:
        listed = ", ".join(known) if known else "none"
        raise InputError(
            f"There is no {kind} {prefix}{name}{where}{nearest(name, known)}; the {kind}s are: "
            f"{listed}."
        )
