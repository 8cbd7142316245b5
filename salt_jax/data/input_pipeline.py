"""Which row at which step: batches as a pure function of the step.

In: the rows of a split, the selected row ids if stage 1 has its own, and a step. Out: host batches.
Every arm reads position i·B of the all-rows order at step i, and SALT_DS alone reads the selected
order at i·B in stage 1. Starting anywhere costs what starting at 0 does: an order is a seeded
permutation per epoch that is computed element by element, and rows are read by random access.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from salt_jax.data import features
from salt_jax.errors import InputError


class RowOrder:
    """An endless order of row ids: every row once per epoch, each epoch shuffled anew.

    Args:
      row_ids: The rows to draw from; None is all of 0 … rows − 1.
      rows: How many there are when row_ids is None.
      seed: Of the shuffle.
    """

    def __init__(self, row_ids: np.ndarray | None, rows: int, seed: int) -> None:
        self._row_ids = row_ids
        size = rows if row_ids is None else len(row_ids)
        self._order = grain.MapDataset.range(size).shuffle(seed=seed).repeat()

    def __getitem__(self, position: int) -> int:
        """The row id at a position, from 0 on without end."""
        index = self._order[position]
        return int(index if self._row_ids is None else self._row_ids[index])


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Batches for one process.

    Attributes:
      split: Rows by id (`PackedSplit`).
      batch_size: B, rows of the global batch.
      start_id: What the model reads where a segment begins.
      all_rows: The order that stage 2 reads, and stage 1 too unless it has its own.
      selected_rows: Stage 1's own order (SALT_DS), or None.
      stage1_steps: Steps of stage 1.
      process_index: This process.
      process_count: All processes; each reads its contiguous part of every batch.
      read_threads: Threads that read ahead.
      read_ahead: Batches to hold ready.
    """

    split: Any
    batch_size: int
    start_id: int
    all_rows: RowOrder
    selected_rows: RowOrder | None = None
    stage1_steps: int = 0
    process_index: int = 0
    process_count: int = 1
    read_threads: int = 2
    read_ahead: int = 4

    def __post_init__(self) -> None:
        if self.batch_size % self.process_count:
            raise InputError(
                f"batch_size {self.batch_size} is not divisible by {self.process_count} processes: "
                "change batch_size."
            )

    def row_ids(self, step: int) -> list[int]:
        """The rows that this process reads at a step, in order."""
        part = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * part
        own_order = self.selected_rows is not None and step < self.stage1_steps
        order = self.selected_rows if own_order and self.selected_rows else self.all_rows
        return [order[position] for position in range(first, first + part)]

    def batch(self, step: int) -> features.Batch:
        """The batch of a step, read at once."""
        return features.make_batch(self.split.__getitems__(self.row_ids(step)), self.start_id)

    def batches(self, first_step: int, steps: int) -> Iterator[features.Batch]:
        """The batches of steps first_step … steps − 1, read ahead in threads."""
        count = steps - first_step
        if count <= 0:
            return iter(())
        dataset = grain.MapDataset.range(first_step, steps).map(self.batch)
        options = grain.ReadOptions(
            num_threads=self.read_threads, prefetch_buffer_size=self.read_ahead
        )
        return iter(dataset.to_iter_dataset(options))


def in_order(
    split: Any, batch_size: int, start_id: int, rows: int | None = None
) -> Iterator[features.Batch]:
    """The first `rows` rows of a split (all by default) once, in order, in equal batches.

    The last batch is filled up with copies of its last row that have no loss weight and row id −1.
    """
    total = len(split) if rows is None else min(rows, len(split))
    for first in range(0, total, batch_size):
        ids = list(range(first, min(first + batch_size, total)))
        batch = features.make_batch(split.__getitems__(ids), start_id)
        missing = batch_size - len(ids)
        if missing:
            batch = {
                name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
                for name, array in batch.items()
            }
            batch["loss_weights"][-missing:] = 0.0
            batch["row_id"][-missing:] = -1
        yield batch
