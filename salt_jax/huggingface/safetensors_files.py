"""Reads a model's safetensors files in parts, and writes them one tensor at a time.

A folder has model.safetensors, or shards and model.safetensors.index.json; pickles are never read.
A file is an 8-byte little-endian header length, a JSON header with each tensor's dtype, shape and
offsets, and the tensors.

The safetensors library validates headers: offsets are in the file, without gap or overlap, and fit
dtype and shape. Values are read and written here instead, because the library maps files: its
slices take twice their size in memory and six times as long (100 MB: 0.05 s, not 0.008 s), and a
file truncated meanwhile kills the process. It also accepts duplicate names in a header, and writes
only shards held in memory whole.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from salt_jax.errors import InputError
from salt_jax.huggingface.model_folders import refuse_without_safetensors
from salt_jax.storage.durable_files import whole_file, write_text
from salt_jax.storage.json_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, np.dtype[Any]] = types.MappingProxyType(
    {
        "float32": np.dtype(np.float32),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float16": np.dtype(np.float16),
    }
)
_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# The remedy for a bad file of a model.
DOWNLOAD = "name the folder of a downloaded model, or download it again"
_GIT_LFS = b"version https://git-lfs"
_READ_BYTES = 4 << 20

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, or one to be written."""

    name: str
    dtype: str  # one of DTYPES, or the file's name of an unsupported dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class _Place:
    info: TensorInfo
    path: pathlib.Path
    offset: int  # of its first byte in the file
    end: int  # the byte after its last


class SafetensorsFolder:
    """The tensors of a folder's safetensors files by name, read lazily."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the headers; InputError if there are no safetensors files (only pickles, say), or
        they are damaged or contradict their index."""
        self.path = pathlib.Path(path)
        self._places: dict[str, _Place] = {}
        index = _index(self.path)
        self._paths = [self.path / name for name in sorted(set(index.values()) or {SINGLE_FILE})]
        if not index and not self._paths[0].is_file():
            refuse_without_safetensors(self.path, f"{SINGLE_FILE} nor {INDEX_FILE}")
        for place in (place for file in self._paths for place in _read_header(file)):
            if other := self._places.get(place.info.name):
                raise InputError(
                    f"The tensor {place.info.name} is in {place.path} and in {other.path}: "
                    "download the folder again."
                )
            self._places[place.info.name] = place
        for name, file_name in index.items():
            if name not in self._places or self._places[name].path.name != file_name:
                raise InputError(
                    f"{self.path / INDEX_FILE} has the tensor {name} in {file_name}, which lacks "
                    "it: download the folder again."
                )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {name: place.info for name, place in self._places.items()}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the files' names and bytes; reads all of them."""
        return self.inspect(lambda name, values: None)

    def inspect(self, look: Callable[[str, Array], None]) -> str:
        """Reads all files once, calls `look` with each tensor's name and a flat part of its values
        at a time (tensors of unsupported dtypes are skipped), and returns the digest."""
        digest = hashlib.sha256()
        places = sorted(self._places.values(), key=lambda place: place.offset)
        for path in self._paths:
            of_file = hashlib.sha256()
            with path.open("rb") as file:
                for place in (place for place in places if place.path == path):
                    # Tensors are contiguous after the header.
                    of_file.update(file.read(place.offset - file.tell()))
                    while size := min(_READ_BYTES, place.end - file.tell()):
                        part = file.read(size)
                        if len(part) != size:
                            raise InputError(f"{path} has become shorter: copy it again.")
                        of_file.update(part)
                        if place.info.dtype in DTYPES:
                            look(place.info.name, np.frombuffer(part, DTYPES[place.info.dtype]))
                of_file.update(file.read())
            digest.update(path.name.encode() + b"\0" + of_file.digest())
        return digest.hexdigest()

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """A tensor in the file's dtype, or a slice (without a step) of its first axis."""
        place = self._places[name]
        shape, dtype = place.info.shape, DTYPES[place.info.dtype]
        start, stop, _ = rows.indices(shape[0])
        row_values = math.prod(shape[1:])
        offset = place.offset + start * row_values * dtype.itemsize
        count = (stop - start) * row_values
        values = np.fromfile(place.path, dtype, count=count, offset=offset)
        if len(values) != count:
            raise InputError(f"{place.path} has become shorter while it was read: copy it again.")
        return values.reshape(stop - start, *shape[1:])


def write_shards(
    folder: pathlib.Path,
    tensors: Sequence[TensorInfo],
    arrays: Iterator[Array],
    max_shard_bytes: int,
) -> list[str]:
    """Writes tensors into as few files as possible, with an index if there are several.

    Args:
      folder: An existing folder.
      tensors: The tensors.
      arrays: Their values in the same order, requested one at a time.
      max_shard_bytes: The most bytes of values in a file; a larger tensor gets its own file.

    Returns:
      The names of the files, the index included.
    """
    shards: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        held = sum(other.num_bytes for other in shards[-1])
        if shards[-1] and held + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0], arrays)
        return [SINGLE_FILE]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, arrays)
        weight_map |= {tensor.name: name for tensor in shard}
    size = {"total_size": sum(tensor.num_bytes for tensor in tensors)}
    index = json.dumps({"metadata": size, "weight_map": weight_map}, indent=2)
    write_text(folder / INDEX_FILE, index + "\n")
    return [*dict.fromkeys(weight_map.values()), INDEX_FILE]


def _index(folder: pathlib.Path) -> dict[str, str]:
    """Each tensor's file by the index; empty if there is no index."""
    file = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not file.is_file():
        return {}
    found = read_json_object(file, DOWNLOAD).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{file} has no weight_map of tensors: download the folder again.")
    for name, file_name in found.items():
        if not isinstance(file_name, str) or pathlib.Path(file_name).name != file_name:
            raise InputError(
                f"{file} has the tensor {name} in {file_name!r}, expected the plain name of a "
                "file beside it: download the folder again."
            )
    return found


def _read_header(file: pathlib.Path) -> list[_Place]:
    if not file.is_file():
        raise InputError(f"{file} is missing: download the folder again.")
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=_without_doubles)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(_GIT_LFS):
            raise InputError(
                f"{file} is a Git LFS pointer and not the file: run `git lfs pull` in its "
                "folder, or download it again."
            ) from error
        raise InputError(
            f"{file} is not a complete safetensors file ({error}): download it again."
        ) from error
    header.pop("__metadata__", None)
    return [
        _Place(
            TensorInfo(name, _CODES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])),
            file,
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    ]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses duplicate names, which readers interpret differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _write_file(path: pathlib.Path, tensors: Sequence[TensorInfo], arrays: Iterator[Array]) -> None:
    codes = {dtype: code for code, dtype in _CODES.items()}
    # transformers requires the framework's name.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns values to 8 bytes
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            array = next(arrays)
            assert array.shape == tensor.shape, f"{tensor.name} is {array.shape}, not as announced"
            assert array.dtype == DTYPES[tensor.dtype], f"{tensor.name} is {array.dtype}"
            # NumPy's buffer protocol doesn't support bfloat16.
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
