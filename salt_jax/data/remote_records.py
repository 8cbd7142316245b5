"""Reads rows of ArrayRecord files in a bucket by range, in few requests.

A shard's index, at its end, says where each record begins (Riegeli's format with ArrayRecord's
footers, uncompressed, one record a group, as `cache_shards` writes it). The ArrayRecord library
then reads the records, and compares their hashes, from a sparse copy that has their bytes.
"""

import dataclasses
import os
import resource
import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from array_record.python import array_record_module

from salt_jax.errors import InputError
from salt_jax.storage.block_copies import BLOCK, BlockCopy, InputFolder

# Riegeli interrupts data every 64 KiB by a header of 24 bytes; a chunk has one of 40.
_BLOCK_BYTES, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40
# The library may read this far beyond the beginning of a record.
_READER_BUFFER = 2**15
_SHARDS_AT_ONCE = 16


class RemoteRecords:
    """The records of shards in a bucket's folder, numbered through, by `__getitems__`.

    Args:
      folder: The folder.
      shards: Each {"file", "rows"}.
    """

    def __init__(self, folder: InputFolder, shards: Sequence[Mapping[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        self._ends = np.cumsum([shard["rows"] for shard in shards])
        self._opened: dict[int, _Shard] = {}
        self._opening = threading.Lock()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # three for each shard

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteRecords, (self._folder, self._shards)

    def __getitems__(self, ids: Sequence[int]) -> list[bytes]:
        """Records in the order asked for.

        Raises:
          RuntimeError: A shard is damaged.
          ValueError: A shard has no index that can be read.
          BucketError: The bucket cannot be read.
        """
        places: dict[int, list[int]] = {}
        for place, index in enumerate(np.searchsorted(self._ends, ids, side="right").tolist()):
            places.setdefault(index, []).append(place)
        positions = {
            index: [
                ids[place] - int(self._ends[index]) + self._shards[index]["rows"] for place in own
            ]
            for index, own in places.items()
        }
        try:
            read = self._read(positions)
        except InputError:
            raise
        except (RuntimeError, ValueError):  # the machine stopped while it wrote a copy, perhaps
            with self._opening:
                for index in positions:
                    self._opened.pop(index, None)
                    self._folder.copy(self._shards[index]["file"]).discard()
            read = self._read(positions)
        records = [b""] * len(ids)
        for index, own in places.items():
            for place, record in zip(own, read[index], strict=True):
                records[place] = record
        return records

    def _read(self, positions: Mapping[int, Sequence[int]]) -> dict[int, Sequence[bytes]]:
        shards = self._open(positions)
        self._folder.fetch(
            (shard.copy, *shard.range(row)) for i, shard in shards.items() for row in positions[i]
        )
        with futures.ThreadPoolExecutor(min(len(shards), _SHARDS_AT_ONCE)) as pool:
            return dict(
                pool.map(
                    lambda one: (one[0], one[1].reader.read(positions[one[0]])), shards.items()
                )
            )

    def _open(self, wanted: Mapping[int, Any]) -> "dict[int, _Shard]":
        """The shards by number, opened if they aren't: with two or three requests for each, all
        at once."""
        with self._opening:
            opened = {i: shard for i in wanted if (shard := self._opened.get(i))}
            opened = {i: shard for i, shard in opened.items() if shard.copy.is_current}
            copies = {
                i: self._folder.copy(self._shards[i]["file"]) for i in wanted if i not in opened
            }
            # The reader looks at the beginning; an index is likely in the last blocks.
            ends = [(c, c.bytes - _BLOCK_BYTES - BLOCK, c.bytes) for c in copies.values()]
            self._folder.fetch([*ends, *((copy, 0, 1) for copy in copies.values())])
            footers = {i: _footer_start(copy) for i, copy in copies.items()}
            self._folder.fetch((copies[i], start, copies[i].bytes) for i, start in footers.items())
            new = {i: _Shard.of(copies[i], start) for i, start in footers.items()}
            self._opened |= new
            return opened | new


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A shard's copy, its reader, and where its records begin: int64[rows + 1], the last their
    end."""

    copy: BlockCopy
    reader: Any
    starts_n: np.ndarray

    @classmethod
    def of(cls, copy: BlockCopy, footer: int) -> "_Shard":
        """From a copy that has its footer."""
        reader = array_record_module.ArrayRecordReader(
            os.fspath(copy), "readahead_buffer_size:0", file_reader_buffer_size=_READER_BUFFER
        )
        sizes, values = _records(copy, footer)
        # After the file's own record, for each of its records: 8 begins 16 size 24 count.
        fields = _varints(values[sizes[0] :])
        if len(fields) % 6 or (fields[::6] != 8).any():
            raise ValueError(f"the index of {copy} is damaged")
        return cls(copy, reader, np.append(fields[1::6], footer))

    def range(self, row: int) -> tuple[int, int]:
        """The bytes that reading a row may touch."""
        start, end = self.starts_n[row : row + 2].tolist()
        return start, end + 2 * _READER_BUFFER


def _footer_start(copy: BlockCopy) -> int:
    """Where the index begins, by the last block."""
    _, values = _records(copy, copy.bytes - _BLOCK_BYTES)
    return int(_varints(values[:16])[1])


def _records(copy: BlockCopy, at: int) -> tuple[np.ndarray, np.ndarray]:
    """The sizes, int64[n], and the bytes of the records in the uncompressed chunk at a position;
    ValueError for another chunk."""
    data, first = copy.part(at, copy.bytes), -at % _BLOCK_BYTES
    data = data[:first] + b"".join(
        data[block + _BLOCK_HEADER : block + _BLOCK_BYTES]
        for block in range(first, len(data), _BLOCK_BYTES)
    )
    size, kind = struct.unpack_from("<8xQ8xB", data.ljust(_CHUNK_HEADER))
    body = np.frombuffer(data, np.uint8)[_CHUNK_HEADER : _CHUNK_HEADER + size]
    if kind != ord("r") or len(body) != size or body[0] != 0:
        raise ValueError(f"the index of {copy} is compressed, or damaged")
    sizes_end = int(_varints(body[1:11])[0])
    at = 1 + int(np.argmax(body[1:] < 128)) + 1
    return _varints(body[at : at + sizes_end]), body[at + sizes_end :]


def _varints(data: np.ndarray) -> np.ndarray:
    """The numbers, int64[n], that bytes hold in protocol buffers' variable length."""
    ends = np.flatnonzero(data < 128)
    starts = np.append(0, ends[:-1] + 1)
    data = data[: ends[-1] + 1].astype(np.int64)
    shifts = 7 * (np.arange(len(data)) - np.repeat(starts, ends - starts + 1))
    return np.add.reduceat((data & 127) << shifts, starts)
