"""Columns of one number a row, kept in shards.

In: arrays of a shard's rows, by name. Out: the shard's bytes: one column after another, each the
little-endian numbers of its rows; and columns of the whole split again, read from any place in
them. A column of hundreds of millions of rows is never in memory whole unless it is asked for so.

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
    """Writes a shard's columns.

    Args:
      file: The shard.
      layout: What `layout_of` gave.
      columns: An array of the shard's rows for each.
    """
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
    """

    def __init__(
        self, shards: FinishedShards, layout: Layout, name: str, may_be_nan: bool = False
    ) -> None:
        self._shards, self._name, self._may_be_nan = shards, name, may_be_nan
        self.dtype = np.dtype(dict(layout)[name])
        names = [each for each, _ in layout]
        before = layout[: names.index(name)]
        self._row_bytes_before = sum(np.dtype(dtype).itemsize for _, dtype in before)

    def __len__(self) -> int:
        return self._shards.rows

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """An array in memory of the rows asked for, in that order.

        Raises:
          InputError: A shard's bytes have changed, or hold NaN.
        """
        if isinstance(rows, slice):
            first, stop, step = rows.indices(len(self))
            assert step == 1, f"rows in steps of {step}"
            return self._checked(self._read(first, stop), first)
        shard_m = rows // self._shards.shard_rows
        values_m = np.empty(len(rows), self.dtype)
        for index in np.unique(shard_m):
            here_m = shard_m == index
            values_m[here_m] = self._map(index)[rows[here_m] - index * self._shards.shard_rows]
        return self._checked(values_m, rows)

    def _checked(self, values_n: np.ndarray, rows: int | np.ndarray) -> np.ndarray:
        """Refuses what is no number; `rows` are the rows' ids, or the first of them."""
        if self.dtype.kind != "f" or self._may_be_nan or (values_n < np.inf).all():
            return values_n
        at = int((values_n < np.inf).argmin())
        row = rows + at if isinstance(rows, int) else rows[at]
        shard = int(row) // self._shards.shard_rows
        what = f"has a {self._name} of {values_n[at]} for row {row}, which is not finite"
        raise self._shards.damage(shard, what)

    def _read(self, first: int, stop: int) -> np.ndarray:
        size = self._shards.shard_rows
        values_n = np.empty(max(stop - first, 0), self.dtype)
        at = first
        while at < stop:
            index, end = at // size, min((at // size + 1) * size, stop)
            part = self._map(index)[at - index * size : end - index * size]
            values_n[at - first : end - first] = part
            at = end
        return values_n

    def _map(self, index: int) -> np.ndarray:
        # Mapped anew each time: what stays mapped counts as this process's memory.
        rows = self._shards.rows_of(index)
        path = self._shards.path(index)
        return np.memmap(path, self.dtype, "r", offset=rows * self._row_bytes_before, shape=rows)
