"""Checks every setting that a verb would use, before it is called.

gin constructs objects lazily, so a bad setting could fail in the middle of a run. `uses` finds what
calling a verb would construct and read, without constructing it, so that a missing setting or one
of the wrong type is reported before a device starts.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import gin
from salt_jax.cli.config_errors import display_name, flag_of
from salt_jax.cli.setting_groups import is_macro, is_reference, is_required
from salt_jax.errors import InputError
from salt_jax.storage.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Use:
    """A function or class that gin would call (`is_call`) or pass as a value, by its name with its
    gin scope ("decoder.DecoderConfig"); or a macro that it would read ("%STEPS", which has one
    binding, "value")."""

    name: str
    target: Callable[..., Any]
    bindings: Mapping[str, Any]
    is_call: bool


def uses(verb: Callable[..., Any]) -> list[Use]:
    """Everything that calling a verb would use, the verb itself first."""
    found: dict[str, Use] = {}
    _add(verb, "", True, found)
    return [*found.values()]


def _add(target: Callable[..., Any], scope: str, is_call: bool, found: dict[str, Use]) -> None:
    name = f"{target.__module__.rpartition('.')[2]}.{target.__name__}"
    name = f"%{scope}" if name == "config.macro" else f"{scope}/{name}" if scope else name
    name = name if is_call or name[0] == "%" else f"@{name}"
    if name in found:
        return
    with gin.config_scope(scope or None):
        bindings = gin.get_bindings(target, resolve_references=False)
    found[name] = Use(name, target, bindings, is_call)
    for reference in _references(bindings):
        made = reference.configurable.wrapped
        if not isinstance(made, types.BuiltinFunctionType):
            _add(made, "/".join(reference.scopes), reference.evaluate, found)


def _references(value: Any) -> Iterator[Any]:
    if is_reference(value):
        yield value
    elif isinstance(value, Mapping):
        yield from _references([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def missing_settings(used: Collection[Use]) -> Iterator[str]:
    """Names of the required parameters, and of the macros, that have no value."""
    for use in used:
        if use.name[0] == "%":
            yield from () if use.bindings else (use.name[1:],)
        elif use.is_call:
            for name, parameter in inspect.signature(use.target).parameters.items():
                has_value = name in use.bindings or parameter.default is not parameter.empty
                is_one = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
                if is_one and not has_value and parameter.annotation is not RunFolder:
                    yield f"{use.name}.{name}"


def require_types(used: Collection[Use], flags: Mapping[str, str]) -> None:
    """Raises InputError for the first value that its parameter's type excludes; `flags` are the
    flag names by setting."""
    for use in used:
        if use.name[0] == "%" or not use.is_call:
            continue
        init = use.target.__init__ if inspect.isclass(use.target) else use.target
        hints = typing.get_type_hints(init)
        for parameter in use.bindings.keys() & hints.keys():
            _require_type(f"{use.name}.{parameter}", use.bindings[parameter], hints, flags)


def _require_type(
    name: str, value: Any, hints: Mapping[str, Any], flags: Mapping[str, str]
) -> None:
    hint = hints[name.rpartition(".")[2]]
    setting, given = name, value
    if is_macro(value):
        setting = "/".join(value.scopes)
    try:
        given = _without_macros(value)
    except RecursionError as error:
        raise InputError(f"{value} refers to itself: give it a value.") from error
    change = f"change {flag_of(setting, flags).partition('=')[0]}"
    if is_reference(given) and given.evaluate:
        made = given.configurable.wrapped
        is_ours = inspect.isclass(made) and made.__module__.startswith("salt_jax.")
        if is_ours and not makes(made, hint):
            raise InputError(
                f"{display_name(name, flags)} is set to @{given.configurable.name}(), expected "
                f"{described(hint)}: {change}."
            )
    elif not [*_references([given])] and not is_a(given, hint):
        raise InputError(
            f"{display_name(name, flags)} is {given!r}, expected {described(hint)}: {change}."
        )


def _without_macros(value: Any) -> Any:
    """A value with each macro replaced by its value; macros without one stay."""
    if is_macro(value):
        with gin.config_scope("/".join(value.scopes)):
            bound = gin.get_bindings("gin.macro", resolve_references=False)
        return _without_macros(bound["value"]) if bound else value
    if isinstance(value, Mapping):
        return {_without_macros(key): _without_macros(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_macros, value))
    return value


def close_unused_settings(verb: Callable[..., Any]) -> None:
    """Binds None to settings that gin files leave REQUIRED and the verb would not use.

    Settings of code outside this package stay REQUIRED: it may query gin in other ways.
    """
    used = uses(verb)
    for (scope, selector), settings in [*gin.config._CONFIG.items()]:
        if selector.startswith(("gin.macro", "salt_jax.")):
            for name in [name for name, value in settings.items() if is_required(value)]:
                if not _is_used(scope, selector, name, used):
                    gin.bind_parameter((scope, selector, name), None)


def _is_used(scope: str, selector: str, name: str, used: Collection[Use]) -> bool:
    if selector == "gin.macro":
        return any(use.name == f"%{scope}" for use in used)
    # Compared by the last part: a class may be bound through another module than it is used from.
    last = selector.rpartition(".")[2]
    return any(
        use.name.rpartition(".")[2] == last and is_required(use.bindings.get(name)) for use in used
    )


_WORDS: Mapping[Any, tuple[str, str]] = {
    bool: ("True or False", "Trues and Falses"),
    float: ("a number", "numbers"),
    int: ("a whole number", "whole numbers"),
    str: ("a string", "strings"),
    type(None): ("None", "Nones"),
}
_UNIONS = (typing.Union, types.UnionType)


def is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value fits a type hint; unsupported hints accept any value."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return any(is_a(value, part) for part in parts)
    if origin is typing.Literal:
        return True  # the dataclass itself checks the choices
    if origin in (Sequence, list, tuple):
        inner = parts[0] if parts and len({*parts} - {...}) == 1 else Any
        return isinstance(value, list | tuple) and all(is_a(item, inner) for item in value)
    if hint is type(None):
        return value is None
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    # A dataclass or protocol: no plain value fits.
    plain = bool | int | float | str | list | tuple | None
    return hint is Any or not isinstance(value, plain)


def makes(target: type, hint: Any) -> bool:
    """Whether instances of a class fit a type hint; unsupported hints accept any class."""
    if typing.get_origin(hint) in _UNIONS:
        return any(makes(target, part) for part in typing.get_args(hint))
    if not inspect.isclass(hint):
        return True
    if getattr(hint, "_is_protocol", False):
        has = {*dir(target), *inspect.signature(target).parameters}
        own = {name for name in vars(hint) if not name.startswith("_") or name == "__call__"}
        return own <= has
    return issubclass(target, hint)


def described(hint: Any) -> str:
    """A type in words: "a whole number or None"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(described(part) for part in parts)
    if origin in (Sequence, list, tuple):
        element = parts[0] if parts else None
        if typing.get_origin(element) is tuple and len(typing.get_args(element)) == 2:
            return "a list of pairs, as (('NAME', VALUE),)"
        of = _WORDS.get(element)
        return f"a list of {of[1]}" if of else "a list"
    if origin is Mapping:
        return "a dictionary"
    if hint in _WORDS:
        return _WORDS[hint][0]
    name = getattr(hint, "__name__", str(hint))
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name} of a gin file"
