"""The `salt` command: `salt VERB --gin_file=A --gin.NAME=value --output_dir=PATH`.

In: the command line. Out: one verb of `salt_jax.commands` called with its gin settings, and an exit
code: 0 finished, 1 the run failed, 2 bad input, 75 interrupted and saved (start it again).
Nothing else in the package knows gin.
"""

import ast
import copy
import errno
import importlib
import inspect
import logging
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from salt_jax import __version__
from salt_jax.command_line import (
    USAGE,
    Arguments,
    nearest,
    parse_arguments,
    require_known,
    verb_help,
    verb_table,
    verbs,
)
from salt_jax.errors import InputError, Interrupted, RunFailed
from salt_jax.run_folder import RunFolder

PACKAGE = pathlib.Path(__file__).parent
CONFIGS = PACKAGE / "configs"
DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"


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
    except BrokenPipeError:  # the reader of our output, `| head` for one, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(
            f"salt: {error.filename or '--output_dir'} cannot be written ({error.strerror}): make "
            "room, or choose another --output_dir.",
            file=sys.stderr,
        )
        return 2


def _run(argv: list[str]) -> int:
    if argv and argv[0] == "--version":
        print(f"salt_jax {__version__}")
        return 0
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(USAGE + "\nverbs:\n" + verb_table(), end="")
        return 0 if argv else 2
    arguments = parse_arguments(argv)
    require_known("verb", arguments.verb, verbs())
    if arguments.help:
        print(verb_help(arguments.verb), end="")
        return 0
    if arguments.output_dir is None:
        raise InputError("No output folder was given: add --output_dir=FOLDER.")
    if "://" in arguments.output_dir:
        raise InputError(
            f"--output_dir={arguments.output_dir} is not on this machine's disk: mount the bucket "
            "(gcsfuse, s3fs) and name the mounted folder."
        )
    verb = configure(arguments)
    folder = RunFolder(
        path=pathlib.Path(arguments.output_dir),
        verb=arguments.verb,
        config=gin.operative_config_str,
        command_line=["salt", *argv],
    )
    verb(folder)
    return 0


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
        raise InputError(
            f"`salt {verb}` needs the library {error.name}, which is not installed: "
            "pip install 'salt_jax[prepare]'."
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
    _explained(gin.finalize, files=files)
    missing = list(_missing_settings(function, set()))
    if not missing:
        _refuse_wrong_types(function, set())
    elif missing[0].rpartition(".")[2] == getattr(
        sys.modules[function.__module__], "POSITIONAL", 0
    ):
        raise InputError(f"Nothing to {verb} was named: `salt {verb} FOLDER…`.")
    else:
        flag = _flag(missing[0])
        raise InputError(f"{missing[0]} is not set: add {flag}, or a gin file that sets it.")
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
        require_known("setting", name, [*parameters, "gin_file", "output_dir"], prefix="--")
        annotation = str(parameters[name].annotation)
        is_list = "Sequence" in annotation
        if "bool" in annotation:
            values = [v.capitalize() if v.lower() in ("true", "false") else v for v in values]
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
        f"{nearest(name.removeprefix('gin/'), known)}: correct --gin_file."
    )


def _files_and_modules(parsed: Iterable[Any]) -> tuple[list[pathlib.Path], list[str]]:
    files: list[pathlib.Path] = []
    modules: list[str] = []
    for file in parsed:
        paths = (pathlib.Path(file.filename), CONFIGS / file.filename)
        files.append(next(path for path in paths if path.is_file()))
        modules += file.imports
        more_files, more_modules = _files_and_modules(file.includes)
        files += more_files
        modules += more_modules
    return files, modules


def _refuse_unknown_macros(bindings: Iterable[str], files: Iterable[pathlib.Path]) -> None:
    """gin takes any NAME = value as a macro; one that nothing refers to is a slip of the pen."""
    texts = {str(file): file.read_text() for file in files}
    used = set(re.findall(r"%(\w+)", "\n".join([*texts.values(), *bindings]))) - {"gin"}
    texts[""] = "\n".join(bindings)
    for file, text in texts.items():
        where = f" of {file}" if file else ""
        for name in re.findall(r"^(\w+)\s*=", text, re.M):
            require_known(f"macro{where}", name, used, prefix="" if file else "--gin.")


def _missing_settings(function: Callable[..., Any], seen: set[str]) -> Iterator[str]:
    """Names of settings without a value, among all that calling `function` would need."""
    bindings = gin.get_bindings(function, resolve_references=False)
    selector = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    scoped = "/".join([*gin.config.current_scope(), selector])
    if scoped in seen:
        return
    seen.add(scoped)
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        if required and name not in bindings and parameter.annotation is not RunFolder:
            yield f"{scoped}.{name}"
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
            with gin.config_scope(reference.scopes or None):
                yield from _missing_settings(target, seen)


def _refuse_wrong_types(function: Callable[..., Any], seen: set[str]) -> None:
    """Checks plain values against the annotations, of `function` and of all that it refers to."""
    selector = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    if selector in seen:
        return
    seen.add(selector)
    constructor = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(constructor)
    for name, value in gin.get_bindings(function, resolve_references=False).items():
        for reference in _references([value]):
            if reference.configurable.selector != "gin.macro" and reference.evaluate:
                _refuse_wrong_types(reference.configurable.wrapped, seen)
        macros = [r for r in _references([value]) if r.configurable.selector == "gin.macro"]
        if list(_references([value])) == macros and name in hints:
            plain = copy.deepcopy(value)
            if not _is_a(plain, hints[name]):
                kind = str(inspect.signature(function).parameters[name].annotation)
                kind = hints[name].__name__ if isinstance(hints[name], type) else kind
                raise InputError(f"{selector}.{name} is {plain!r}, and must be of type {kind}.")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type; of types unknown here, anything is."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is typing.Literal:
        return True  # the dataclass itself lists the choices
    if origin in (Sequence, list, tuple):
        inner = parts[0] if parts and len({*parts} - {...}) == 1 else Any
        return isinstance(value, list | tuple) and all(_is_a(item, inner) for item in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    # A dataclass or protocol wants an object, which no plain value is.
    return hint is Any or not isinstance(value, bool | int | float | str | list | tuple)


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, gin.config.ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        yield from _references([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _explained(
    parse: Callable[..., Any], *arguments: Any, files: Sequence[pathlib.Path] = ()
) -> Any:
    """Calls gin; its errors become one sentence with the name, the file and the nearest name."""
    logging.disable(logging.ERROR)  # gin logs every place where it looks for a file in vain
    try:
        return parse(*arguments)
    except InputError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename else "the command line"
        text, message = str(error.text).strip(), str(error.msg).partition("\n")[0]
        reason = "a text needs quotes of its own" if "malformed node" in message else message
        raise InputError(
            f"{where}: gin cannot read {text!r}: {reason}, as in --gin.NAME=\"'text'\"."
            if reason != message
            else f"{where}: gin cannot read {text!r} ({message})."
        ) from error
    except (NameError, AttributeError, ValueError, ImportError, TypeError, OSError) as error:
        message, _, location = str(error).partition("\n")
        raise InputError(_gin_sentence(message, location, files)) from error
    finally:
        logging.disable(logging.NOTSET)


def _gin_sentence(message: str, location: str, files: Sequence[pathlib.Path]) -> str:
    place = re.search(r'In file "([^"]*)", line (\d+)', location)
    where = f"{place[1]}, line {place[2]}" if place else "the command line"
    if match := re.match(r"'(\w+)' was not provided by an import statement", message):
        imported = re.findall(r"from [\w.]+ import (\w+)", _text_of(place)) + verbs()
        return (
            f"{where}: {match[1]} is not imported there{nearest(match[1], imported)}: correct "
            "the name, or add the import of its module."
        )
    if match := re.match(
        r"Couldn't resolve selector ([\w.]+); <module '([\w.]+)'.* has no attribute (\w+)", message
    ):
        known = [n for n in vars(importlib.import_module(match[2])) if not n.startswith("_")]
        return f"{where}: {match[1]} is unknown{nearest(match[3], known)}: correct the name."
    if match := re.match(
        r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
    ):
        known = _parameters_of(match[1])
        return (
            f"{where}: {match[1]} has no setting {match[2]}{nearest(match[2], known)}: "
            "correct the name."
        )
    if match := re.match(r"(\S+) set to `%gin.REQUIRED`", message):
        name = match[1].removesuffix("/gin.macro.value").removesuffix("/macro.value")
        # gin shortens the name; the file has it in full.
        for file in files:
            pattern = rf"^\s*((?:\w+[./])*{re.escape(name)})\s*=\s*%gin\.REQUIRED"
            if found := re.search(pattern, file.read_text(), re.M):
                return f"{found[1]} must be set ({file} leaves it open): add {_flag(found[1])}."
        return f"{name} must be set: add {_flag(name)}."
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


def _flag(name: str) -> str:
    """The flag that sets a name: --SETTING for a verb's own, --gin.NAME for any other."""
    verb, _, setting = name.rpartition(".")
    own = verb.partition(".")[0] in verbs() and verb.partition(".")[2] in (
        "",
        verb.partition(".")[0],
    )
    return f"--{setting}=VALUE" if verb and own else f"--gin.{name}=VALUE"


def _sentence(error: Exception) -> str:
    """An error's own text, without what gin appends to errors that pass through it."""
    return str(error).partition("\n  In call to configurable")[0]
