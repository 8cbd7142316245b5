"""Parses the command line, and writes --help.

Help is parsed from the verbs' source files, so it needs none of the libraries they import.
"""

import ast
import os
import pathlib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from salt_jax.errors import InputError, nearest
from salt_jax.runtime import processes

PACKAGE = pathlib.Path(__file__).parent.parent
COMMANDS = PACKAGE / "commands"
# The name of the parameter that holds a verb's tree of settings; setting paths omit it.
ROOT = "config"

_COMMON_FLAGS = ("gin_file", "safe_gin", "output_dir", *processes.FLAGS)

# Environment variable that passes --safe_gin on to child `salt` processes.
SAFE_GIN = "SALT_SAFE_GIN"
_NO_VALUE = "--{name} needs a value: --{name}=VALUE."
_SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}

USAGE = """\
usage: salt VERB [--gin_file=FILE]… [--gin.NAME=VALUE]… [--SETTING=VALUE]… --output_dir=FOLDER

  --gin_file=FILE     a gin file, found from here or among the package's own (gin/); repeatable,
                      a later file overrides an earlier one
  --safe_gin          let gin files set only salt_jax's own settings: without it, a gin file
                      can run any code by importing it (docs/configuration.md)
  --gin.NAME=VALUE    one setting (config.TrainConfig.seed=1) or macro (STEPS=500); overrides files
  --SETTING=VALUE     a setting of the verb, by its name or the end of its path: --teacher=RUN,
                      --data.seed=1
  --output_dir=FOLDER where the verb writes config.gin, run.json, summary.json and its results
  --coordinator_address=HOST:PORT --process_count=N --process_index=I, or --multi_process=True
                      one of several processes (docs/launching.md); also read from the environment:
                      SALT_PROCESS_INDEX, …
  --help, --version
"""


class Arguments(NamedTuple):
    """A parsed command line."""

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
    """Parses a command line; InputError for a flag without its value, or bytes that are not
    UTF-8."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{argument} is not UTF-8: correct it, and rename the file or folder that it names."
            ) from error
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
            # The flag can only turn it on; it never overrides SALT_SAFE_GIN.
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


def verb_table() -> str:
    """A line for each verb."""
    lines = []
    for verb in verbs():
        tree = ast.parse((COMMANDS / f"{verb}.py").read_text(encoding="utf-8"))
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines.append(f"  {verb:10} {first.partition(': ')[2] or first}\n")
    return "".join(lines) + "\n`salt VERB --help` lists a verb's settings.\n"


def verb_help(verb: str) -> str:
    """The --help text of a verb: what it does, and its settings."""
    source = Source.of(COMMANDS / f"{verb}.py")
    function = next(
        n for n in source.tree.body if isinstance(n, ast.FunctionDef) and n.name == verb
    )
    text = (ast.get_docstring(function) or "").partition("\nArgs:\n")[0]
    about = (ast.get_docstring(source.tree) or "").partition("\n")[2]
    lines = [f"salt {verb}: {text.strip()}", about, "", "Settings:"]
    arguments = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    fields = [Field(a.arg, a.annotation, default) for a, default in arguments]
    explained = _explained(function, "Args")
    settings = list(_described(fields, explained, source, ()))
    paths = [path for path, *_ in settings]
    groups = {path.rpartition(".")[0] for path in paths}
    optional = [path for path, kind, *_ in settings if path in groups and "None" in kind]
    for path, kind, default, words in settings:
        is_optional = any(path.startswith(f"{outer}.") for outer in optional)
        required = "no default" if is_optional else "required"
        value = required if default is None else f"default {ast.unparse(default)}"
        flag = shortest(paths, path.removesuffix(".path"))
        setting = f"  --{flag}: {kind} ({value})"
        lines.append(f"\n  {path or 'all'} ({kind})" if path in groups or not path else setting)
        wrapped = textwrap.wrap(words, 94, break_on_hyphens=False)
        lines += textwrap.indent("\n".join(wrapped), " " * 6).splitlines()
    return "\n".join([*lines, "", USAGE])


class Field(NamedTuple):
    """A function parameter or dataclass field, as parsed from source."""

    name: str
    hint: ast.expr | None
    default: ast.expr | None


class Source(NamedTuple):
    """A parsed module and the names it imports from this package."""

    tree: ast.Module
    imports: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, file: pathlib.Path) -> "Source":
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        imports = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in named
            for alias in node.names
            if node.module and node.module.startswith("salt_jax.")
        }
        return cls(tree, imports)

    def dataclass(self, hint: ast.expr | None) -> tuple[ast.ClassDef, "Source"] | None:
        """The first dataclass of this package that a type hint names, and its module."""
        for node in _alternatives(hint):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = ".".join(self.imports.get(node.value.id, ("", "")))
                found = _class(module, node.attr)
            elif isinstance(node, ast.Name):
                here = [n for n in self.tree.body if isinstance(n, ast.ClassDef)]
                own = next((n for n in here if n.name == node.id), None)
                found = (own, self) if own else _class(*self.imports.get(node.id, ("", "")))
            else:
                continue
            if found and any("dataclass" in ast.unparse(d) for d in found[0].decorator_list):
                return found
        return None


def _alternatives(hint: ast.expr | None) -> list[ast.expr | None]:
    """The types of a union, or the one type."""
    if isinstance(hint, ast.BinOp):
        return [*_alternatives(hint.left), *_alternatives(hint.right)]
    return [hint]


def _class(module: str, name: str) -> tuple[ast.ClassDef, Source] | None:
    """Finds a class by a module that defines or imports it."""
    file = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    if not module.startswith("salt_jax.") or not file.is_file():
        return None
    source = Source.of(file)
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, source
    return _class(*source.imports[name]) if name in source.imports else None


def _described(
    fields: Iterable[Field], explained: Mapping[str, str], source: Source, outer: tuple[str, ...]
) -> Iterator[tuple[str, str, ast.expr | None, str]]:
    """Yields the path, type, default and description of each setting: plain settings first, then
    each group followed by the settings in it."""
    groups = []
    for field in fields:
        path = (*outer, field.name) if outer or field.name != ROOT else ()
        kind = ast.unparse(field.hint) if field.hint else ""
        line = (".".join(path), kind, field.default, explained.get(field.name, ""))
        if group := source.dataclass(field.hint):
            groups.append((path, line, group))
        else:
            yield line
    for path, line, (node, where) in groups:
        yield line
        inner = [
            Field(part.target.id, part.annotation, part.value)
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]
        yield from _described(inner, _explained(node, "Attributes"), where, path)


def _explained(node: ast.FunctionDef | ast.ClassDef, section: str) -> dict[str, str]:
    """The descriptions in a docstring's "Args" or "Attributes" section, by name."""
    text = (ast.get_docstring(node) or "").partition(f"\n{section}:\n")[2].partition("\n\n")[0]
    explained: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(text).splitlines():
        if start := re.match(r"(\w+): (.*)", line):
            name, explained[start[1]] = start.groups()
        elif name:
            explained[name] += f" {line.strip()}"
    return explained


def shortest(paths: Sequence[str], path: str) -> str:
    """The shortest suffix of a setting's path that is unique: the name of its flag."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        name = ".".join(parts[-count:])
        if name not in paths and sum(f".{p}".endswith(f".{name}") for p in paths) == 1:
            return name
    return path


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
