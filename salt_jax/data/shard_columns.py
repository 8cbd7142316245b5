"""Sharded columns of one number per row; a shard is an .npy file of records, one field per column.

    np.load("shards/00003-of-00007.npy", mmap_mode="r")["median_drop_k10"]

Only the rows asked for are read into memory.
"""

import io
import os
from collections.abc import Mapping

import numpy as np

from salt_jax.data.npy_files import map_npy
from salt_jax.storage.restartable_shards import FinishedShards, ShardWriter

SUFFIX = ".npy"
# The suffix of scores of format version 2: one column after another, without a header.
OLD_SUFFIX = ".columns"


def write_columns(file: ShardWriter, columns: Mapping[str, np.ndarray], dtype: np.dtype) -> None:
    """Writes a shard of structured `dtype`, from an array of the shard's rows for each field."""
    assert columns.keys() == set(dtype.names or ()), f"columns {set(columns)} of {dtype}"
    records_n = np.empty(len(next(iter(columns.values()))), dtype)
    for name, values_n in columns.items():
        records_n[name] = values_n
    whole = io.BytesIO()
    np.lib.format.write_array(whole, records_n, version=(3, 0), allow_pickle=False)
    file.write(whole.getbuffer())


class Column:
    """One column of all rows, on disk: `column[a:b]` and `column[ids]` read those rows.

    Args:
      shards: The shards.
      dtype: The structured type of their rows.
      name: The field.
      may_be_nan: Whether NaN and ∞ are allowed (−∞ always is: a row without a learnable token).
      verify: Whether a shard is compared with its digest when first read. Otherwise only the rows
        asked for are fetched from a bucket; shards then have no header.
    """

    def __init__(
        self,
        shards: FinishedShards,
        dtype: np.dtype,
        name: str,
        may_be_nan: bool = False,
        verify: bool = True,
    ) -> None:
        self._shards, self._rows_dtype, self._name = shards, dtype, name
        self._verify = verify
        self.dtype = dtype[name]
        self._may_be_nan = may_be_nan or self.dtype.kind != "f"

    def __len__(self) -> int:
        return self._shards.rows

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The rows asked for, in that order; InputError if a shard has changed or holds NaN."""
        size = self._shards.shard_rows
        if isinstance(rows, slice):
            first, stop, step = rows.indices(len(self))
            assert step == 1, f"rows in steps of {step}"
            stop = max(first, stop)
            values_n = np.empty(stop - first, self.dtype)
            for index in range(first // size, -(-stop // size)):
                start, end = max(first, index * size), min(stop, (index + 1) * size)
                part = self._map(index)[start - index * size : end - index * size]
                values_n[start - first : end - first] = part
        else:
            values_n = np.empty(len(rows), self.dtype)
            shard_n = rows // size
            if not self._verify:
                width = self._rows_dtype.itemsize
                places = zip(shard_n.tolist(), (rows % size * width).tolist(), strict=True)
                self._shards.fetch((index, at, at + width) for index, at in places)
            for index in np.unique(shard_n):
                here_n = shard_n == index
                values_n[here_n] = self._map(index)[rows[here_n] - index * size]
        if self._may_be_nan or (values_n < np.inf).all():
            return values_n
        at = int(np.argmin(values_n < np.inf))
        row = first + at if isinstance(rows, slice) else int(rows[at])
        what = f"has a {self._name} of {values_n[at]} for row {row}, which is not finite"
        raise self._shards.damage(row // size, what)

    def _map(self, index: int) -> np.ndarray:
        # Mapped anew each time, since pages that stay mapped count as this process's memory.
        path, rows = self._shards.path(index, self._verify), self._shards.rows_of(index)
        if self._shards.suffix != SUFFIX:
            # Format version 2: one column after another.
            offset = rows * self._rows_dtype.fields[self._name][1]  # type: ignore[index]
            return np.memmap(os.fspath(path), self.dtype, "r", offset=offset, shape=rows)
        again = "copy the folder again, or delete that file and run its `salt score` again"
        return map_npy(path, self._rows_dtype, rows, again)[self._name]
