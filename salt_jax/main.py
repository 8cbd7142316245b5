"""The `salt` command: `salt VERB --gin_file=A --gin.NAME=value --output_dir=PATH`.

In: the command line. Out: one verb of `salt_jax.commands` called with its gin settings, and an exit
code: 0 finished, 1 the run failed, 2 bad input, 75 interrupted and saved (start it again).
Nothing else in the package knows gin.
"""

import ast
import difflib
import importlib
import inspect
import logging
import os
import pathlib
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gin
from salt_jax import __version__
from salt_jax.errors import InputError, Interrupted, RunFailed
from salt_jax.run_folder import RunFolder

PACKAGE = pathlib.Path(__file__).parent
CONFIGS = PACKAGE / "configs"
DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"

USAGE = """\
usage: salt VERB [--gin_file=FILE]… [--gin.NAME=VALUE]… [--SETTING=VALUE]… --output_dir=FOLDER

  --gin_file=FILE     a gin file, found from here or among the package's own (gin/); repeatable,
                      a later file overrides an earlier one
  --gin.NAME=VALUE    one setting (train.train.seed=1) or macro (STEPS=500), over the files
  --SETTING=VALUE     a setting of the verb itself: --seed=1 is --gin.VERB.VERB.seed=1
  --output_dir=FOLDER where the verb writes config.gin, run.json, summary.json and its results
  --help, --version
"""


class Arguments(NamedTuple):
    """A command line, taken apart."""

    verb: str
    gin_files: list[str]
    bindings: list[str]
    settings: dict[str, list[str]]
    positional: list[str]
    output_dir: str | None
    help: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except InputError as error:
        print(f"salt: {_sentence(error)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"salt: {_sentence(error)}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"salt: {_sentence(error)}", file=sys.stderr)
        return 75
    except BrokenPipeError:  # the reader of our output, `| head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("salt: interrupted before anything was to be saved.", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    if argv and argv[0] == "--version":
        print(f"salt_jax {__version__}")
        return 0
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(USAGE + "\nverbs:\n" + _verb_table(), end="")
        return 0 if argv else 2
    arguments = parse_arguments(argv)
    _require_known("verb", arguments.verb, verbs())
    if arguments.help:
        print(_verb_help(arguments.verb), end="")
        return 0
    if arguments.output_dir is None:
        raise InputError("No output folder was given: add --output_dir=FOLDER.")
    verb = configure(arguments)
    folder = RunFolder(
        path=pathlib.Path(arguments.output_dir),
        verb=arguments.verb,
        config=gin.operative_config_str,
        command_line=["salt", *argv],
    )
    verb(folder)
    return 0


def verbs() -> list[str]:
    """The verbs: one a file in commands/."""
    return sorted(
        path.stem for path in (PACKAGE / "commands").glob("*.py") if not path.stem.startswith("_")
    )


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Takes a command line apart.

    Raises:
      InputError: A flag without its value.
    """
    arguments = Arguments(argv[0], [], [], {}, [], None, False)
    rest = iter(argv[1:])
    for argument in rest:
        if argument in ("--help", "-h"):
            arguments = arguments._replace(help=True)
            continue
        if not argument.startswith("--"):
            arguments.positional.append(argument)
            continue
        name, separator, value = argument[2:].partition("=")
        if not separator:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise InputError(f"--{name} needs a value: --{name}=VALUE.")
        if name == "gin_file":
            arguments.gin_files.append(value)
        elif name.startswith("gin."):
            arguments.bindings.append(f"{name.removeprefix('gin.')} = {value}")
        elif name == "output_dir":
            arguments = arguments._replace(output_dir=value)
        else:
            arguments.settings.setdefault(name, []).append(value)
    return arguments


def configure(arguments: Arguments) -> Callable[[RunFolder], None]:
    """Reads the gin files and bindings; gives the verb's function, ready to be called.

    Raises:
      InputError: An unknown name, a missing setting or file, or a value gin cannot read.
    """
    gin.clear_config()
    gin.config._LOCATION_PREFIXES[:] = ["", str(CONFIGS)]  # no public call empties the list
    verb = arguments.verb
    try:
        function = getattr(importlib.import_module(f"salt_jax.commands.{verb}"), verb)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("salt_jax"):
            raise
        extra = "prepare" if verb in ("prepare", "smoke") else verb
        raise InputError(
            f"`salt {verb}` needs the library {error.name}, which is not installed: "
            f"pip install 'salt_jax[{extra}]'."
        ) from error
    parsed = [_explained(gin.parse_config_file, _find_gin_file(f)) for f in arguments.gin_files]
    files, modules = _files_and_modules(parsed)
    _refuse_unknown_macros(arguments.bindings, files)
    modules = sorted({*modules, f"salt_jax.commands.{verb}"} - {"__gin__.dynamic_registration"})
    imports = [DYNAMIC_REGISTRATION]
    imports += [f"from {m.rpartition('.')[0]} import {m.rpartition('.')[2]}" for m in modules]
    own = _own_settings(function, arguments)
    # A reference registers the function with gin even when nothing is bound to it.
    register = [f"salt_verb = @{verb}.{verb}"]
    _explained(gin.parse_config, "\n".join([*imports, *arguments.bindings, *own, *register]))
    _explained(gin.finalize)
    missing = list(_missing_settings(function, set()))
    if missing:
        setting = missing[0].removeprefix(f"{verb}.{verb}.")
        flag = f"--{setting}" if setting != missing[0] else f"--gin.{missing[0]}"
        raise InputError(f"{missing[0]} is not set: add {flag}=VALUE, or a gin file that sets it.")
    return gin.get_configurable(function)


def _own_settings(function: Callable[..., None], arguments: Arguments) -> list[str]:
    """The bindings that --SETTING=VALUE flags and positional arguments stand for."""
    parameters = _parameters(function)
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
        _require_known("setting", name, [*parameters, "gin_file", "output_dir"], prefix="--")
        annotation = str(parameters[name].annotation)
        is_list = "Sequence" in annotation
        literals = [repr(v) if _is_text(v, annotation) else v for v in values]
        literal = f"({', '.join(literals)},)" if is_list else literals[-1]
        bindings.append(f"{arguments.verb}.{arguments.verb}.{name} = {literal}")
    return bindings


def _is_text(value: str, annotation: str) -> bool:
    """Whether a flag's value stands for itself, and is no Python literal or gin reference."""
    if re.match(r"[@%][A-Za-z_]", value) or value == "None":
        return False
    if "str" in annotation:
        return True
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return True
    return False


def _parameters(function: Callable[..., None]) -> Mapping[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _find_gin_file(name: str) -> str:
    candidates = [pathlib.Path(name), CONFIGS / name, CONFIGS / name.removeprefix("gin/")]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    known = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin")]
    raise InputError(
        f"There is no gin file {name}, neither here nor in {CONFIGS}"
        f"{_nearest(name.removeprefix('gin/'), known)}: correct --gin_file."
    )


def _files_and_modules(parsed: Iterable[Any]) -> tuple[list[str], list[str]]:
    files: list[str] = []
    modules: list[str] = []
    for file in parsed:
        files.append(file.filename)
        modules += file.imports
        more_files, more_modules = _files_and_modules(file.includes)
        files += more_files
        modules += more_modules
    return files, modules


def _refuse_unknown_macros(bindings: Iterable[str], files: Iterable[str]) -> None:
    """gin takes any NAME = value as a new macro; one that no file mentions is a slip of the pen."""
    names = [binding.partition(" = ")[0] for binding in bindings]
    paths = [next(p for p in (pathlib.Path(f), CONFIGS / f) if p.is_file()) for f in files]
    text = "\n".join(path.read_text() for path in paths)
    text = text.replace("%gin.REQUIRED", "")
    known = set(re.findall(r"^(\w+)\s*=", text, re.M)) | set(re.findall(r"%(\w+)", text))
    for name in names:
        if "." not in name:
            _require_known("macro", name, known, prefix="--gin.")


def _missing_settings(function: Callable[..., Any], seen: set[str]) -> Iterator[str]:
    """Names of settings without a value, among all that calling `function` would need."""
    bindings = gin.get_bindings(function, resolve_references=False)
    selector = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    if selector in seen:
        return
    seen.add(selector)
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        if required and name not in bindings and parameter.annotation is not RunFolder:
            yield f"{selector}.{name}"
    for reference in _references(list(bindings.values())):
        target = reference.configurable.wrapped
        if reference.configurable.selector == "gin.macro":
            macro = "/".join(reference.scopes)
            with gin.config_scope(macro):
                value = gin.get_bindings("gin.macro", resolve_references=False)
            if not value:
                yield macro
            for inner in _references(list(value.values())):
                yield from _missing_settings(inner.configurable.wrapped, seen)
        elif not isinstance(target, types.BuiltinFunctionType) and reference.evaluate:
            yield from _missing_settings(target, seen)


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, gin.config.ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        yield from _references([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _explained(parse: Callable[..., Any], *arguments: Any) -> Any:
    """Calls gin; its errors become one sentence with the name, the file and the nearest name."""
    logging.disable(logging.ERROR)  # gin logs every place where it looks for a file in vain
    try:
        return parse(*arguments)
    except InputError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename else "the command line"
        text = str(error.text).strip()
        raise InputError(f"{where}: gin cannot read {text!r} ({error.msg}).") from error
    except (NameError, AttributeError, ValueError, ImportError, TypeError, OSError) as error:
        message, _, location = str(error).partition("\n")
        raise InputError(_gin_sentence(message, location)) from error
    finally:
        logging.disable(logging.NOTSET)


def _gin_sentence(message: str, location: str) -> str:
    place = re.search(r'In file "([^"]*)", line (\d+)', location)
    where = f"{place[1]}, line {place[2]}" if place else "the command line"
    if match := re.match(r"'(\w+)' was not provided by an import statement", message):
        imported = re.findall(r"from [\w.]+ import (\w+)", _text_of(place)) + verbs()
        return (
            f"{where}: {match[1]} is not imported there{_nearest(match[1], imported)}: correct "
            "the name, or add the import of its module."
        )
    if match := re.match(
        r"Couldn't resolve selector ([\w.]+); <module '([\w.]+)'.* has no attribute (\w+)", message
    ):
        known = [n for n in vars(importlib.import_module(match[2])) if not n.startswith("_")]
        return f"{where}: {match[1]} is unknown{_nearest(match[3], known)}: correct the name."
    if match := re.match(
        r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
    ):
        known = _parameters_of(match[1])
        return (
            f"{where}: {match[1]} has no setting {match[2]}{_nearest(match[2], known)}: "
            "correct the name."
        )
    if match := re.match(r"(\S+) set to `%gin.REQUIRED`", message):
        name = match[1].removesuffix("/gin.macro.value").removesuffix("/macro.value")
        return f"{name} must be set{_required_in(name)}: add --gin.{name}=VALUE."
    return f"{where}: {message.rstrip('.')}."


def _text_of(place: re.Match[str] | None) -> str:
    if place is None:
        return ""
    paths = [pathlib.Path(place[1]), CONFIGS / place[1]]
    return next((p.read_text() for p in paths if p.is_file()), "")


def _parameters_of(selector: str) -> list[str]:
    """Parameter names of what a selector such as decoder.DecoderConfig names."""
    module_name, _, name = selector.rpartition(".")
    for module in list(sys.modules.values()):
        full_name = getattr(module, "__name__", "")
        is_it = full_name.startswith("salt_jax") and f".{full_name}".endswith(f".{module_name}")
        if is_it and callable(target := getattr(module, name, None)):
            return list(inspect.signature(target).parameters)
    return []


def _required_in(name: str) -> str:
    """Where a configuration marks `name` as required: " (FILE marks it so)"."""
    pattern = re.compile(rf"^\s*{re.escape(name)}\s*=\s*%gin\.REQUIRED", re.M)
    for path in CONFIGS.rglob("*.gin"):
        if pattern.search(path.read_text()):
            return f" ({path.relative_to(CONFIGS)} leaves it open)"
    return ""


def _require_known(kind: str, name: str, known: Iterable[str], prefix: str = "") -> None:
    known = sorted(known)
    if name not in known:
        listed = ", ".join(known) if known else "none"
        raise InputError(
            f"There is no {kind} {prefix}{name}{_nearest(name, known)}; the {kind}s are: {listed}."
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: {matches[0]})" if matches else ""


def _sentence(error: Exception) -> str:
    """An error's own text, without what gin appends to errors that pass through it."""
    return str(error).partition("\n  In call to configurable")[0]


def _verb_table() -> str:
    lines = []
    for verb in verbs():
        tree = ast.parse((PACKAGE / "commands" / f"{verb}.py").read_text())
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines.append(f"  {verb:10} {first.partition(': ')[2] or first}\n")
    return "".join(lines) + "\n`salt VERB --help` lists a verb's settings.\n"


def _verb_help(verb: str) -> str:
    """The verb's docstrings and signature, read without importing its libraries."""
    tree = ast.parse((PACKAGE / "commands" / f"{verb}.py").read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == verb)
    lines = [f"salt {verb}: {(ast.get_docstring(function) or '').strip()}", "", "Settings:"]
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        value = "required" if default is None else f"default {ast.unparse(default)}"
        lines.append(f"  --{argument.arg}: {kind} ({value})")
    epilogue = ast.get_docstring(tree) or ""
    return "\n".join([*lines, "", textwrap.dedent(epilogue), "", USAGE])
