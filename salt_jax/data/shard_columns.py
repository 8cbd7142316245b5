"""Columns of one value a row, kept in shards.

A shard is one column after another, each the little-endian values of its rows. A column of hundreds
of millions of rows is never in memory whole unless it is asked for so.

Shard 3's scores by hand, where the manifest's columns begin [["targets_hash", "<u8"],
["median_drop_k10", "<f4"], …] and the shard has n rows:

    np.memmap("shards/00003-of-00007.columns", "<f4", "r", offset=8 * n, shape=n)
"""

from collections.abc import Mapping, Sequence

import numpy as np

from salt_jax.storage.restartable_shards import FinishedShards, ShardWriter

SUFFIX = ".columns"

# Names and types in the order in which a shard holds them: wide ones first, so all are aligned.
Layout = Sequence[tuple[str, str]]


def layout_of(dtypes: Mapping[str, str]) -> list[tuple[str, str]]:
    """The order of columns of these types ("<f4")."""
    return sorted(dtypes.items(), key=lambda item: -np.dtype(item[1]).itemsize)


def write_columns(file: ShardWriter, layout: Layout, columns: Mapping[str, np.ndarray]) -> None:
    """Writes a shard's columns: an array of the shard's rows for each name."""
    assert columns.keys() == dict(layout).keys(), f"columns {set(columns)} of {layout}"
    for name, dtype in layout:
        file.write(np.ascontiguousarray(columns[name], dtype).data.cast("B"))


class Column:
    """One column of all rows, on disk: `column[a:b]` reads rows a … b − 1, `column[ids]` those.

    Args:
      shards: The shards that hold it.
      layout: Their columns.
      name: Which of them.
      may_be_nan: Whether rows are known to have no number: else NaN and ∞ are refused (−∞ is the
        score of a row without a learnable token).
      verify: Whether a shard is compared with its digest when it is first read.
    """

    def __init__(
        self,
        shards: FinishedShards,
        layout: Layout,
        name: str,
        may_be_nan: bool = False,
        verify: bool = True,
    ) -> None:
        self._shards, self._name, self._verify = shards, name, verify
        self.dtype = np.dtype(dict(layout)[name])
        self._may_be_nan = may_be_nan or self.dtype.kind != "f"
        before = layout[: [each for each, _ in layout].index(name)]
        self._row_bytes_before = sum(np.dtype(dtype).itemsize for _, dtype in before)

    def __len__(self) -> int:
        return self._shards.rows

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """An array in memory of the rows asked for, in that order.

        Raises:
          InputError: A shard's bytes have changed, or hold NaN.
        """
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
            for index in np.unique(shard_n):
                here_n = shard_n == index
                values_n[here_n] = self._map(index)[rows[here_n] - index * size]
        if self._may_be_nan or (values_n < np.inf).all():
            return values_n
        at = int((values_n < np.inf).argmin())
        row = first + at if isinstance(rows, slice) else int(rows[at])
        what = f"has a {self._name} of {values_n[at]} for row {row}, which is not finite"
        raise self._shards.damage(row // size, what)

    def _map(self, index: int) -> np.ndarray:
        # Mapped anew each time: what stays mapped counts as this process's memory.
        rows = self._shards.rows_of(index)
        path = self._shards.path(index, self._verify)
        return np.memmap(path, self.dtype, "r", offset=rows * self._row_bytes_before, shape=rows)
