"""gin files, bindings and flags in; a verb's function, ready to be called, out.

Nothing else in the package knows gin, but for `main`, the words of its errors (`config_errors`) and
what may be read of it untrusted (`safe_gin`).
"""

import copy
import importlib
import inspect
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import gin
from gin import config_parser
from salt_jax.cli.command_line import Arguments, require_known
from salt_jax.cli.config_errors import CONFIGS, explained, flag_of, plain
from salt_jax.cli.safe_gin import require_safe_bindings, require_safe_file
from salt_jax.cli.setting_groups import (
    alternatives,
    bindings_of,
    bound_value,
    default_groups,
    flags_of,
    settings_of,
)
from salt_jax.cli.setting_types import described, is_a, makes
from salt_jax.errors import InputError, nearest
from salt_jax.storage import gin_files
from salt_jax.storage.run_folder import RunFolder

DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"
MODEL_CLASS = "DecoderConfig"
# Settings that each of several processes may have its own of.
_OWN_TO_A_PROCESS = ("compilation_cache", "read_threads", "hang_seconds", "worker")


def configure(arguments: Arguments) -> Callable[[RunFolder], None]:
    """Reads the gin files and bindings; gives the verb's function, ready to be called.

    Raises:
      InputError: An unknown name, a missing setting or file, or a value gin cannot read.
    """
    gin.clear_config()
    # No public call empties these lists. gin's other reader looks into Python packages, for which
    # it takes any folder of a gin file's name in the working directory.
    gin.config._LOCATION_PREFIXES[:] = [""]
    gin.config._FILE_READERS[:] = [(_open_gin_file, lambda name: True)]
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
    _refuse_unreadable(arguments.bindings)
    named = [_find_gin_file(file) for file in arguments.gin_files]
    if arguments.safe_gin:
        for path in named:
            require_safe_file(path, _find_gin_file)
    in_files = [one for path in named for one in gin_files.statements_of(path, _find_gin_file)]
    for path in named:
        explained(gin.parse_config_file, path, statements=in_files)
    modules = {one.module for one in in_files if isinstance(one, config_parser.ImportStatement)}
    _refuse_unknown_macros(arguments.bindings, in_files)
    groups = {one.group.__module__ for one in settings_of(function) if one.group}
    modules |= {f"salt_jax.commands.{verb}", *groups}

    def bind(text: str) -> None:
        if arguments.safe_gin:
            require_safe_bindings(text)
        list(gin_files.statements_in(text))  # or it is told what cannot be read of it
        explained(gin.parse_config, text, statements=in_files)

    bind("\n".join([*_imports(modules), *arguments.bindings]))
    # A reference registers the function with gin even when nothing is bound to it.
    explained(gin.parse_config, "\n".join([*_imports(modules), f"salt_{verb} = @{verb}.{verb}"]))
    _make_groups(function)
    for name, values in _flags(function, arguments):
        macros = [n for n, one in gin_files.bindings_in(in_files) if not one.arg_name]
        for binding in bindings_of(function, name, values, macros):
            bind("\n".join([*_imports(modules), binding]))
    _make_groups(function)
    _read_model_files(function, arguments.safe_gin)
    _close_what_is_not_needed(function)
    _close_unused_settings(function)
    flags = flags_of(function)
    explained(gin.finalize, statements=in_files, flags=flags)
    missing = list(_missing_settings(function, set()))
    if not missing:
        _refuse_wrong_types(function, set(), flags)
    elif missing[0].rpartition(".")[2] == getattr(
        sys.modules[function.__module__], "POSITIONAL", 0
    ):
        raise InputError(f"Nothing to {verb} was named: `salt {verb} FOLDER…`.")
    else:
        name, flag = plain(missing[0], flags), flag_of(missing[0], flags)
        examples = getattr(sys.modules[function.__module__], "FROM_FILES", {})
        if file := examples.get(missing[0].rpartition(".")[2]):
            raise InputError(
                f"{name} is not set: add a gin file that sets it (--gin_file={file}, say)."
            )
        raise InputError(f"{name} is not set: add {flag}, or a gin file that sets it.")
    return gin.get_configurable(function)


def _flags(
    function: Callable[..., None], arguments: Arguments
) -> Iterator[tuple[str, Sequence[str]]]:
    """The verb's flags and positional arguments, by setting."""
    settings = dict(arguments.settings)
    if arguments.positional:
        name = getattr(sys.modules[function.__module__], "POSITIONAL", None)
        if name is None:
            raise InputError(
                f"`salt {arguments.verb}` takes no argument {arguments.positional[0]!r}: "
                "settings are written --NAME=VALUE."
            )
        settings[name] = [*settings.get(name, []), *arguments.positional]
    yield from settings.items()


def _make_groups(function: Callable[..., None]) -> None:
    """Binds the verb's groups of settings that nothing is bound to."""
    for text in default_groups(function):
        explained(gin.parse_config, f"{DYNAMIC_REGISTRATION}\n{text}")


def _close_what_is_not_needed(function: Callable[..., None]) -> None:
    """Lets what files leave REQUIRED be what the verb's NEEDS_NO says."""
    closed = getattr(sys.modules[function.__module__], "NEEDS_NO", {})
    for setting in settings_of(function):
        key = f"{setting.owner.__qualname__}.{setting.name}"
        if key in closed and _is_open(bound_value(setting)):
            module = f"{DYNAMIC_REGISTRATION}\n"
            explained(gin.parse_config, module + setting.bind(repr(closed[key])))


def settings_of_all() -> str:
    """What is set, as far as several processes must have the same of it."""
    bindings = gin_files.bindings_in(gin_files.statements_in(gin.config_str()))
    return repr(
        [
            (name, binding.value)
            for name, binding in bindings
            if binding.arg_name not in _OWN_TO_A_PROCESS
        ]
    )


def _imports(modules: Iterable[str]) -> list[str]:
    """The lines that bring modules into a text for gin."""
    split = [m.rpartition(".") for m in sorted({*modules} - {"__gin__.dynamic_registration"})]
    lines = [
        f"from {package} import {name}" if package else f"import {name}"
        for package, _, name in split
    ]
    return [DYNAMIC_REGISTRATION, *lines]


def _close_unused_settings(function: Callable[..., None]) -> None:
    """Lets what files leave REQUIRED be None where nothing that the verb calls refers to it.

    But for what is not of this package: code of anyone's may ask gin for it by other ways.
    """
    reached: set[str] = set()
    list(_missing_settings(function, reached))
    for (scope, selector), settings in [*gin.config._CONFIG.items()]:
        if not selector.startswith(("gin.macro", "salt_jax.")):
            continue
        for name in [name for name, value in settings.items() if _is_open(value)]:
            if not _is_asked_for(scope, selector, name, reached):
                gin.bind_parameter((scope, selector, name), None)


def _is_asked_for(scope: str, selector: str, name: str, reached: set[str]) -> bool:
    """Whether what refers to a setting, in the scopes that it is made in, finds it open."""
    if selector == "gin.macro":
        return f"%{scope}" in reached
    for one in reached:
        # By the last name: a class may be reached through another module than it is bound through.
        if one.rpartition(".")[2] != selector.rpartition(".")[2]:
            continue
        with gin.config_scope(one.rpartition("/")[0] or None):
            if _is_open(gin.get_bindings(selector, resolve_references=False).get(name)):
                return True
    return False


def _is_open(value: Any) -> bool:
    """Whether a binding is %gin.REQUIRED."""
    is_reference = isinstance(value, gin.config.ConfigurableReference)
    return is_reference and value.configurable.selector == "gin.constant"


def _read_model_files(function: Callable[..., None], safe_gin: bool) -> None:
    """Makes a model of every setting for a DecoderConfig that names a gin file instead.

    The file is read on its own: nothing that is bound elsewhere, to the student for one, reaches
    the model. Its settings get a scope of the setting's name, so that config.gin has them too.
    """
    for setting in list(settings_of(function)):
        models = [t for t in alternatives(setting.hint) if _name_of(t) == MODEL_CLASS]
        value, name = bound_value(setting), setting.name
        if not models or not isinstance(value, str):
            continue
        file = _find_gin_file(value, f"--{name}")
        if safe_gin:
            require_safe_file(file, _find_gin_file)
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
        lines = [*_imports([module]), *lines, setting.bind(f"@{model}()")]
        explained(gin.parse_config, "\n".join(lines))


def _read_model_file(file: str) -> tuple[list[str], dict[str, Any]]:
    """What a model's file and its includes import, and the settings that they make."""
    statements = list(gin_files.statements_of(file, _find_gin_file))
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


def _refuse_unreadable(bindings: Iterable[str]) -> None:
    """Refuses a --gin.NAME=VALUE that gin cannot read, or that is more than one setting."""
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
            f"--gin.{name}={value} cannot be read: write a text in quotes of its own, "
            f"--gin.{name or 'NAME'}=\"'{text}'\", and numbers, True, None and (lists,) without."
        )


def _name_of(hint: Any) -> str:
    return getattr(hint, "__name__", "")


def _find_gin_file(name: str, setting: str = "--gin_file") -> str:
    candidates = [pathlib.Path(name), CONFIGS / name, CONFIGS / name.removeprefix("gin/")]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    known = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin")]
    raise InputError(
        f"There is no gin file {name}, neither here nor in {CONFIGS}"
        f"{nearest(name.removeprefix('gin/'), known)}: correct {setting}."
    )


def _open_gin_file(name: str) -> TextIO:
    return gin_files.open_text(_find_gin_file(name))


def _refuse_unknown_macros(
    bindings: Iterable[str], in_files: Iterable[gin_files.Statement]
) -> None:
    """gin takes any NAME = value as a macro; a flag's that nothing refers to is a slip of the pen.

    A file may set macros for those who include it, and not all of them use all.
    """
    flags = list(gin_files.bindings_in(gin_files.statements_in("\n".join(bindings))))
    every = [*flags, *gin_files.bindings_in(in_files)]
    used = {one.macro for _, b in every for one in gin_files.references_in(b.value)} - {""}
    for name, binding in flags:
        if not binding.arg_name:
            require_known("macro", name, used, prefix="--gin.")


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
    yield from _missing_in(bindings, seen)


def _missing_in(values: Any, seen: set[str]) -> Iterator[str]:
    """The same for all that making `values` would need."""
    for reference in _references(values):
        scopes, target = reference.scopes, reference.configurable.wrapped
        if isinstance(target, types.BuiltinFunctionType):
            continue
        if reference.configurable.selector == "gin.macro":
            own = f"%{'/'.join(scopes)}"
        elif reference.evaluate:
            with gin.config_scope(scopes or None):
                yield from _missing_settings(target, seen)
            continue
        else:  # what calls it gives it the rest
            own = f"@.{target.__name__}"
        if own in seen:
            continue
        seen.add(own)
        with gin.config_scope(scopes or None):
            settings = gin.get_bindings(target, resolve_references=False)
        if own[0] == "%" and not settings:
            yield own[1:]
        yield from _missing_in(settings, seen)


def _refuse_wrong_types(
    function: Callable[..., Any], seen: set[str], flags: Mapping[str, str]
) -> None:
    """Checks plain values against the annotations, of `function` and of all that it refers to."""
    selector = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    selector = "/".join([*gin.config.current_scope(), selector])
    if selector in seen:
        return
    seen.add(selector)
    constructor = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(constructor)
    for name, value in gin.get_bindings(function, resolve_references=False).items():
        full = f"{selector}.{name}"
        for reference in _references([value]):
            if reference.configurable.selector != "gin.macro" and reference.evaluate:
                with gin.config_scope(reference.scopes or None):
                    _refuse_wrong_types(reference.configurable.wrapped, seen, flags)
        if isinstance(value, gin.config.ConfigurableReference) and value.evaluate:
            made = value.configurable.wrapped
            is_ours = inspect.isclass(made) and made.__module__.startswith("salt_jax.")
            if is_ours and name in hints and not makes(made, hints[name]):
                raise InputError(
                    f"{plain(full, flags)} is what @{value.configurable.name}() makes, expected "
                    f"{described(hints[name])}: change {flag_of(full, flags).partition('=')[0]}."
                )
        macros = [r for r in _references([value]) if r.configurable.selector == "gin.macro"]
        if list(_references([value])) == macros and name in hints:
            try:
                given = copy.deepcopy(value)
            except RecursionError as error:
                raise InputError(f"{value} refers to itself: give it a value.") from error
            if not is_a(given, hints[name]):
                flag = flag_of("/".join(macros[0].scopes) if macros else full, flags)
                raise InputError(
                    f"{plain(full, flags)} is {given!r}, expected {described(hints[name])}: change "
                    f"{flag.partition('=')[0]}."
                )


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, gin.config.ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        yield from _references([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)
