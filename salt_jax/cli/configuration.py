"""Configures a verb from gin files, bindings and flags.

Outside cli/, only `main` and `storage.gin_files` use gin.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import gin
from gin import config_parser
from salt_jax.cli.command_line import Arguments, require_known
from salt_jax.cli.config_errors import display_name, explained, flag_of
from salt_jax.cli.config_files import (
    find_gin_file,
    gin_text,
    open_gin_file,
)
from salt_jax.cli.model_files import read_model_files
from salt_jax.cli.safe_gin import require_safe_bindings, require_safe_file
from salt_jax.cli.setting_groups import (
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
    _fill_unneeded_settings(verb)
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


def _fill_unneeded_settings(verb: Verb) -> None:
    """Gives a value to settings that gin files leave REQUIRED and this verb does not need."""
    for setting in settings_of(verb.function):
        key = f"{setting.owner.__qualname__}.{setting.name}"
        if key in verb.not_needed and is_required(bound_value(setting)):
            explained(gin.parse_config, gin_text([], setting.bind(repr(verb.not_needed[key]))))


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
