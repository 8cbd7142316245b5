"""JSON objects read from files that may be damaged, or made to do harm.

An object that is not of the expected shape is refused in one sentence with the file, the place in
it and what was expected there. A file that a manifest names must lie in the manifest's own folder
(`inside`).
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError

# What a value must be: a type (int: a whole number from 0 to 2**63 - 1; float: any finite number);
# (None, shape): that or null; [shape]: a list of such; {str: shape}: an object of such;
# {"name": shape, …}: an object that has these, and perhaps other members.
Shape = Any

_LARGEST_COUNT = 2**63 - 1
# Its objects take several times that in memory; a cache of 100,000 shards needs a tenth of it.
_MOST_BYTES = 256 << 20

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_CALLED = {int: "a whole number of 0 or more", float: "a number", str: "a text", bool: "a bool"}


def read_json_object(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; `remedy` ends the sentence of an error.

    Raises:
      InputError: It cannot be read, is not JSON (NaN is not), or holds something else.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        found = parse_json(file.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): {remedy}.") from error
    except ValueError as error:
        raise InputError(f"{file} is not readable JSON ({error}): {remedy}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}, expected an object: {remedy}.")
    return found


def parse_json(text: str | bytes, **settings: Any) -> Any:
    """`json.loads` of UTF-8, whose strings can be encoded again.

    Raises:
      ValueError: It is not JSON in UTF-8, or nested too deeply.
    """
    # json would accept a lone surrogate in bytes, and guess their encoding.
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        found = json.loads(text, **settings)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _SURROGATE.search(text):
        found = json.loads(valid_unicode(json.dumps(found, ensure_ascii=False)))
    return found


def valid_unicode(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can express and UTF-8 can't."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def require_shape(file: pathlib.Path, found: Mapping[str, Any], shape: Shape, remedy: str) -> None:
    """Refuses a file's object that lacks a member, or has one of another type.

    Raises:
      InputError: With the place in the object, and what was expected there.
    """
    if wrong := _misfit(found, shape, ""):
        raise InputError(f"{file}: {wrong}: {remedy}.")


def inside(folder: pathlib.Path, name: str, remedy: str) -> pathlib.Path:
    """The path of a folder's file by a name that was read from somewhere; it need not exist.

    Raises:
      InputError: The name leads out of the folder: it is absolute, has "..", or follows a link.
    """
    require_inside(str(folder), name, remedy)
    return no_link_out(folder, folder / name, remedy)


def require_inside(folder: str, name: str, remedy: str) -> None:
    """Refuses a name that leads out of a folder, on disk or in a bucket.

    Raises:
      InputError: It is absolute, has "..", or means something else on another system.
    """
    parts = pathlib.PurePosixPath(name).parts
    if not parts or "\0" in name or "\\" in name or os.path.isabs(name) or ".." in parts:
        raise InputError(
            f"{folder} names its file {name!r}, expected one inside the folder: {remedy}."
        )


def no_link_out(folder: pathlib.Path, path: pathlib.Path, remedy: str) -> pathlib.Path:
    """`path`, which lies in a folder; refused if a symbolic link leads out of the folder.

    Raises:
      InputError: With where it leads.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a cycle of links
        raise InputError(f"{path} is a link that leads nowhere: {remedy}.") from error
    if not real.is_relative_to(folder.resolve()):
        raise InputError(f"{path} leads out of its folder, to {real}, by a link: {remedy}.")
    return path


def _misfit(value: Any, shape: Shape, name: str) -> str:
    """What is wrong with a value, "" if nothing is."""
    if isinstance(shape, tuple):
        return "" if value is None else _misfit(value, shape[1], name)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return _unlike(value, "an object", name)
        if missing := sorted(shape.keys() - value.keys() - {str}):
            return f"{name or 'it'} has no {missing[0]}"
        inner = {key: shape[str] for key in value} if str in shape else shape
        parts = [
            (value[key], part, f"{name}.{key}" if name else key) for key, part in inner.items()
        ]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _unlike(value, "a list", name)
        parts = [(each, shape[0], f"{name}[{index}]") for index, each in enumerate(value)]
    else:
        return "" if _is_a(value, shape) else _unlike(value, _CALLED[shape], name)
    return next(filter(None, (_misfit(*part) for part in parts)), "")


def _is_a(value: Any, kind: type) -> bool:
    if kind is int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and 0 <= value <= _LARGEST_COUNT
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _unlike(value: Any, expected: str, name: str) -> str:
    text = json.dumps(value)
    return f"{name or 'it'} is {text[:40]}{'…' * (len(text) > 40)}, expected {expected}"


def _finite(text: str) -> float:
    """A number's value; JSON has no infinity, as which 1e999 would be read."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
