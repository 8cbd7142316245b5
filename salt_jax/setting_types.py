"""Whether a plain value is of the type that a setting is annotated with.

In: a value as a gin file or a flag gives it, and a type hint. Out: yes or no; of types that are not
known here any value is.
"""

import types
import typing
from collections.abc import Sequence
from typing import Any


def is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type; of types unknown here, anything is."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, part) for part in parts)
    if origin is typing.Literal:
        return True  # the dataclass itself lists the choices
    if origin in (Sequence, list, tuple):
        inner = parts[0] if parts and len({*parts} - {...}) == 1 else Any
        return isinstance(value, list | tuple) and all(is_a(item, inner) for item in value)
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
