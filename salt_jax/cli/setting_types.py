"""Checks values from gin files and flags against type hints, and describes types in messages."""

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

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
        of = _WORDS.get(parts[0] if parts else None)
        return f"a list of {of[1]}" if of else "a list"
    if origin is Mapping:
        return "a dictionary"
    if hint in _WORDS:
        return _WORDS[hint][0]
    name = getattr(hint, "__name__", str(hint))
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name} of a gin file"
