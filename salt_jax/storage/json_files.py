"""Reads and validates JSON from files that may be damaged or malicious.

An object of an unexpected shape is refused with the file, the place in it and what was expected.
A file that a manifest names must lie in the manifest's own folder (`inside`).
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError

# The expected shape of a value: a type (int: 0 to 2**63 - 1; float: any finite number);
# (None, shape): that or null; [shape]: a list of such; {str: shape}: an object of such values;
# {"name": shape, …}: an object with these members, and perhaps others.
Shape = Any

_LARGEST_COUNT = 2**63 - 1
# Parsed objects take several times that in memory; a cache of 100,000 shards needs a tenth of it.
_MOST_BYTES = 256 << 20

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_CALLED = {int: "a whole number of 0 or more", float: "a number", str: "a string", bool: "a bool"}


def read_json_object(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; InputError, ending in `remedy`, if it cannot be read, is not JSON
    (NaN is not), or holds something else."""
    from salt_jax.storage.buckets import as_bucket_errors

    try:
        with as_bucket_errors(file, "read"), file.open("rb") as opened:
            text = opened.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        found = parse_json(text, parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): {remedy}.") from error
    except InputError:  # a bucket's
        raise
    except ValueError as error:
        raise InputError(f"{file} is not readable JSON ({error}): {remedy}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}, expected an object: {remedy}.")
    return found


def parse_json(text: str | bytes, **settings: Any) -> Any:
    """`json.loads` of UTF-8, without lone surrogates in strings; ValueError if it is not JSON in
    UTF-8, or nested too deeply."""
    # Given bytes, json would guess the encoding and accept lone surrogates.
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
    """Raises InputError if a file's object lacks a member or has one of another type."""
    if wrong := _misfit(found, shape, ""):
        raise InputError(f"{file}: {wrong}: {remedy}.")


def inside(folder: pathlib.Path, name: str, remedy: str) -> pathlib.Path:
    """The path of a folder's file by an untrusted name; it need not exist. InputError if the name
    leads out of the folder: it is absolute, has "..", or follows a link."""
    require_inside(str(folder), name, remedy)
    return no_link_out(folder, folder / name, remedy)


def require_inside(folder: str, name: str, remedy: str) -> None:
    """Refuses a name that leads out of a folder, on disk or in a bucket: it is absolute, has "..",
    or means something else on another system."""
    parts = pathlib.PurePosixPath(name).parts
    if not parts or "\0" in name or "\\" in name or os.path.isabs(name) or ".." in parts:
        raise InputError(
            f"{folder} names its file {name!r}, expected one inside the folder: {remedy}."
        )


def no_link_out(folder: pathlib.Path, path: pathlib.Path, remedy: str) -> pathlib.Path:
    """Returns `path`, which lies in a folder; InputError if a symbolic link leads out of it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a cycle of links
        raise InputError(f"{path} is a link that leads nowhere: {remedy}.") from error
    if not real.is_relative_to(folder.resolve()):
        raise InputError(f"{path} leads out of its folder, to {real}, by a link: {remedy}.")
    return path


def _misfit(value: Any, shape: Shape, name: str) -> str:
    """How a value differs from its shape, "" if it doesn't."""
    if isinstance(shape, tuple):
        return "" if value is None else _misfit(value, shape[1], name)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return _mismatch(value, "an object", name)
        if missing := sorted(shape.keys() - value.keys() - {str}):
            return f"{name or 'it'} has no {missing[0]}"
        inner = {key: shape[str] for key in value} if str in shape else shape
        parts = [
            (value[key], part, f"{name}.{key}" if name else key) for key, part in inner.items()
        ]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _mismatch(value, "a list", name)
        parts = [(each, shape[0], f"{name}[{index}]") for index, each in enumerate(value)]
    else:
        return "" if _is_a(value, shape) else _mismatch(value, _CALLED[shape], name)
    return next(filter(None, (_misfit(*part) for part in parts)), "")


def _is_a(value: Any, kind: type) -> bool:
    if kind is int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and 0 <= value <= _LARGEST_COUNT
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _mismatch(value: Any, expected: str, name: str) -> str:
    text = json.dumps(value)
    return f"{name or 'it'} is {text[:40]}{'…' * (len(text) > 40)}, expected {expected}"


def _finite(text: str) -> float:
    """A finite number; refuses 1e999, which Python would read as infinity."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number
