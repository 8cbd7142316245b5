"""Configures a verb from gin files, bindings and flags.

Outside cli/, only `main` and `storage.gin_files` use gin.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from gin import config_parser
from salt_jax.cli.command_line import Arguments, require_known
from salt_jax.cli.config_errors import display_name, explained, flag_of
from salt_jax.cli.config_files import (
    find_gin_file,
    gin_text,
    open_gin_file,
)
from salt_jax.cli.safe_gin import require_safe_bindings, require_safe_file
from salt_jax.cli.setting_groups import (
    alternatives,
    bindings_of,
    bound_value,
    default_groups,
    flags_of,
    is_required,
    settings_of,
)
from salt_jax.cli.used_settings import (
    close_unused_settings,
    missing_settings,
    require_types,
    uses,
)
from salt_jax.cli.verb import Verb, load_verb
from salt_jax.errors import InputError
from salt_jax.storage import gin_files
from salt_jax.storage.run_folder import RunFolder

# Settings allowed to differ between the processes of a run.
_OWN_TO_A_PROCESS = ("compilation_cache", "read_threads", "hang_seconds", "worker")


def configure(arguments: Arguments) -> Callable[[RunFolder], None]:
    """Reads a command line's gin files, bindings and flags; returns the verb, ready to call.
    InputError for an unknown name, a missing setting or file, a wrong type, or invalid gin
    syntax."""
    gin.clear_config()
    # gin has no public call to clear these lists. Its default second reader searches Python
    # packages, and takes a folder in the working directory for one.
    gin.config._LOCATION_PREFIXES[:] = [""]
    gin.config._FILE_READERS[:] = [(open_gin_file, lambda name: True)]
    name, verb = arguments.verb, load_verb(arguments.verb)
    function = verb.function
    in_files = _read_gin_files(arguments)
    _refuse_unreadable(arguments.bindings)
    _refuse_unknown_macros(arguments.bindings, in_files)
    modules = {one.module for one in in_files if isinstance(one, config_parser.ImportStatement)}
    modules |= {one.group.__module__ for one in settings_of(function) if one.group}
    modules |= {function.__module__}

    def bind(*lines: str) -> None:
        text = gin_text(modules, *lines)
        if arguments.safe_gin:
            require_safe_bindings(text)
        list(gin_files.statements_in(text))  # its syntax errors are clearer than gin's
        explained(gin.parse_config, text, statements=in_files)

    bind(*arguments.bindings)
    # A reference registers the function with gin even when nothing is bound to it.
    explained(gin.parse_config, gin_text(modules, f"salt_{name} = @{name}.{name}"))
    _make_groups(function)
    for flag, values in _flags(verb, arguments):
        macros = [n for n, one in gin_files.bindings_in(in_files) if not one.arg_name]
        for binding in bindings_of(function, flag, values, macros):
            bind(binding)
    _make_groups(function)
    read_model_files(function, arguments.safe_gin)
    for setting in settings_of(function):
        key = f"{setting.owner.__qualname__}.{setting.name}"
        if key in verb.not_needed and is_required(bound_value(setting)):
            explained(gin.parse_config, gin_text([], setting.bind(repr(verb.not_needed[key]))))
    close_unused_settings(function)
    flags, used = flags_of(function), uses(function)
    require_types(used, flags)
    explained(gin.finalize, statements=in_files, flags=flags)
    if missing := next(missing_settings(used), ""):
        raise InputError(_missing_sentence(missing, verb, flags))
    return gin.get_configurable(function)


def _read_gin_files(arguments: Arguments) -> list[gin_files.Statement]:
    """Parses the gin files with gin; returns their statements."""
    paths = [find_gin_file(file) for file in arguments.gin_files]
    if arguments.safe_gin:
        for path in paths:
            require_safe_file(path, find_gin_file)
    statements = [one for path in paths for one in gin_files.statements_of(path, find_gin_file)]
    for path in paths:
        explained(gin.parse_config_file, path, statements=statements)
    return statements


def _missing_sentence(name: str, verb: Verb, flags: Mapping[str, str]) -> str:
    last = name.rpartition(".")[2]
    if last == verb.positional:
        word = verb.function.__name__
        return f"Nothing to {word} was named: `salt {word} FOLDER…`."
    if file := verb.gin_files.get(last):
        how = f"add a gin file that sets it (--gin_file={file}, say)"
    else:
        how = f"add {flag_of(name, flags)}, or a gin file that sets it"
    return f"{display_name(name, flags)} is not set: {how}."


def _flags(verb: Verb, arguments: Arguments) -> Iterator[tuple[str, Sequence[str]]]:
    """The setting names and values given as flags and positional arguments."""
    settings = dict(arguments.settings)
    if arguments.positional and not verb.positional:
        raise InputError(
            f"`salt {arguments.verb}` takes no argument {arguments.positional[0]!r}: "
            "settings are written --NAME=VALUE."
        )
    if arguments.positional:
        typed = settings.get(verb.positional, [])
        settings[verb.positional] = [*typed, *arguments.positional]
    yield from settings.items()


def _make_groups(function: Callable[..., None]) -> None:
    """Binds setting groups that are still unbound, so that their defaults apply."""
    for text in default_groups(function):
        explained(gin.parse_config, gin_text([], text))


def settings_of_all() -> str:
    """The settings that must agree between all processes of a run, as text."""
    bindings = gin_files.bindings_in(gin_files.statements_in(gin.config_str()))
    return repr(
        [
            (name, binding.value)
            for name, binding in bindings
            if binding.arg_name not in _OWN_TO_A_PROCESS
        ]
    )


def _refuse_unreadable(bindings: Iterable[str]) -> None:
    """Refuses a --gin.NAME=VALUE that gin cannot parse, or that holds several statements."""
    for binding in bindings:
        name, _, value = binding.partition(" = ")
        try:
            [statement] = gin_files.statements_in(binding)
            if isinstance(statement, config_parser.BindingStatement):
                continue
        except ValueError:
            pass
        is_plain = value.isprintable() and not {*value} & {*"'\""}
        text = value if is_plain and value else "text"
        raise InputError(
            f"--gin.{name}={value} cannot be parsed: put a string in its own quotes, "
            f"--gin.{name or 'NAME'}=\"'{text}'\", and numbers, True, None and (lists,) in none."
        )


def _refuse_unknown_macros(
    bindings: Iterable[str], in_files: Iterable[gin_files.Statement]
) -> None:
    """Refuses a --gin.NAME that nothing refers to, which gin would take for a new macro.

    Unused macros in files are fine: an included file may define more than is needed.
    """
    flags = list(gin_files.bindings_in(gin_files.statements_in("\n".join(bindings))))
    every = [*flags, *gin_files.bindings_in(in_files)]
    used = {one.macro for _, b in every for one in gin_files.references_in(b.value)} - {""}
    for name, binding in flags:
        if not binding.arg_name:
            require_known("macro", name, used, prefix="--gin.")


MODEL_CLASS = "DecoderConfig"


def read_model_files(function: Callable[..., None], safe_gin: bool) -> None:
    """Replaces every DecoderConfig setting that names a gin file by the model of that file.

    The file is read on its own, so bindings for the student or others don't affect the model. Its
    settings are bound in a gin scope named after the setting, so that config.gin has them too.
    """
    for setting in list(settings_of(function)):
        models = [
            t for t in alternatives(setting.hint) if getattr(t, "__name__", "") == MODEL_CLASS
        ]
        value, name = bound_value(setting), setting.name
        if not models or not isinstance(value, str):
            continue
        file = find_gin_file(value, f"--{name}")
        if safe_gin:
            require_safe_file(file, find_gin_file)
        imports, settings = _read_model_file(file)
        fields = inspect.signature(models[0]).parameters
        for field in settings:
            where = f" of {MODEL_CLASS}, which {file} sets"
            require_known("setting", field, fields, where=where)
        defaults = {f.name: f.default for f in fields.values() if f.default is not f.empty}
        if unset := sorted(fields.keys() - defaults.keys() - settings.keys()):
            raise InputError(
                f"{file}, the model of --{name}, does not set {', '.join(unset)} of "
                f"{MODEL_CLASS}: name a file of gin/models."
            )
        having = (m for m in imports if hasattr(explained(importlib.import_module, m), MODEL_CLASS))
        if (module := next(having, None)) is None:
            raise InputError(
                f"{file}, the model of --{name}, imports no module that has {MODEL_CLASS}: add "
                "`from salt_jax.models import decoder` to it."
            )
        model = f"{name}/{module.rpartition('.')[2]}.{MODEL_CLASS}"
        lines = [f"{model}.{field} = {value!r}" for field, value in (defaults | settings).items()]
        explained(gin.parse_config, gin_text([module], *lines, setting.bind(f"@{model}()")))


def _read_model_file(file: str) -> tuple[list[str], dict[str, Any]]:
    """The modules that a model's file and its includes import, and the settings they bind."""
    statements = list(gin_files.statements_of(file, find_gin_file))
    imports = [one.module for one in statements if isinstance(one, config_parser.ImportStatement)]
    settings: dict[str, Any] = {}
    for _, binding in gin_files.bindings_in(statements):
        is_own = binding.selector.rpartition(".")[2] == MODEL_CLASS and not binding.scope
        references = list(gin_files.references_in(binding.value))
        if not is_own or references:
            what = references[0] if is_own else binding.selector
            raise InputError(
                f"{gin_files.place_of(binding)}: {what} has no place in a model's file that a "
                f"setting names: it sets {MODEL_CLASS} alone, to plain values, and may include "
                "files that do."
            )
        settings[binding.arg_name] = binding.value
    return [module for module in imports if module.startswith("salt_jax.")], settings
