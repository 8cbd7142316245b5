"""Batches as a function of the step and of how many rows were read before.

A position counts rows, not steps: a run may be resumed with another batch size, other hosts or more
reader threads, and no row is read twice or skipped.

Stage 2 reads the all-rows order at the number of rows consumed in all, and so does stage 1 unless
it has selected rows of its own (SALT_DS), whose order it reads at the number of rows consumed in
stage 1. With an unchanged batch size B that is position i·B at step i: all arms of a comparison
read the same rows at the same step, except SALT_DS in stage 1.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from salt_jax.data import features
from salt_jax.data.denoisers import Denoising
from salt_jax.data.row_order import Draw, Order
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.errors import InputError, require_counts

# What denoising adds to the epochs of selected rows: other rows never have so many.
_SELECTED_EPOCHS = 1 << 31

# The name of stage 1's own rows among epochs.
SELECTED = "selected rows"


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has read: steps completed, and rows consumed in each stage by all processes."""

    step: int = 0
    stage1_rows: int = 0
    stage2_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows consumed in all."""
        return self.stage1_rows + self.stage2_rows


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Batches for one process.

    Attributes:
      sources: Rows by id (`PackedSplit`) of each cache by its name, in the order of the draws'
        numbers.
      batch_size: B, rows of the global batch.
      start_id: What the model reads where a segment begins.
      all_rows: The order that stage 2 reads, and stage 1 too unless it has its own.
      selected_rows: Stage 1's own order (SALT_DS), or None.
      unused_rows: Stage 2's own order, read at the number of rows consumed in stage 2; None is
        all_rows.
      stage1_steps: Steps that read stage 1's rows, and its soft labels.
      start: Where the run stood when this pipeline was made; it gives no batch before that.
      denoising: What changes rows between the cache and the batch, if anything.
      soft_labels: What stands for a teacher: batches of stage 1 have it as well.
      part: Which of the `parts` equal, contiguous parts of every batch to read.
      parts: How many there are: one for each process, unless some hold the same rows.
      read_threads: Threads that read ahead.
      read_ahead: Batches to hold ready.
    """

    sources: Mapping[str, Any]
    batch_size: int
    start_id: int
    all_rows: Order
    selected_rows: Order | None = None
    unused_rows: Order | None = None
    stage1_steps: int = 0
    start: Position = Position()
    denoising: Denoising | None = None
    soft_labels: StoredLabels | None = None
    part: int = 0
    parts: int = 1
    read_threads: int = 2
    read_ahead: int = 4

    def __post_init__(self) -> None:
        if self.batch_size % self.parts:
            raise InputError(
                f"batch_size {self.batch_size} is not divisible by {self.parts} processes: "
                "change batch_size."
            )
        require_counts(read_threads=self.read_threads)

    @property
    def extra_features(self) -> tuple[str, ...]:
        """What batches hold beside `features.make_batch`'s."""
        return self.denoising.features if self.denoising else ()

    def position(self, step: int) -> Position:
        """How far all processes have read when `step` steps are completed."""
        assert step >= self.start.step, f"step {step} of a pipeline from step {self.start.step}"
        in_stage1 = max(0, min(step, self.stage1_steps) - self.start.step)
        in_stage2 = step - self.start.step - in_stage1
        return Position(
            step,
            self.start.stage1_rows + in_stage1 * self.batch_size,
            self.start.stage2_rows + in_stage2 * self.batch_size,
        )

    def draws(self, step: int) -> list[Draw]:
        """The rows that this process reads at a step, in order."""
        position = self.position(step)
        if step < self.stage1_steps and self.selected_rows is not None:
            order, first = self.selected_rows, position.stage1_rows
        elif step >= self.stage1_steps and self.unused_rows is not None:
            order, first = self.unused_rows, position.stage2_rows
        else:
            order, first = self.all_rows, position.rows
        count = self.batch_size // self.parts
        first += self.part * count
        return [order[at] for at in range(first, first + count)]

    def epochs(self, step: int) -> dict[str, float]:
        """How often the rows of each source were read when `step` steps are completed.

        Of a source counts what all_rows reads, or unused_rows over the rows that are left there;
        SELECTED is added where stage 1 has rows of its own.
        """
        position = self.position(step)
        order, skipped, rows = self.all_rows, 0, position.rows
        if self.unused_rows is not None:
            order, rows = self.unused_rows, position.stage2_rows
        elif self.selected_rows is not None:
            skipped = position.stage1_rows
        before, read, sizes = order.rows_read(skipped), order.rows_read(rows), order.sizes()
        epochs = {
            name: (read[source] - before[source]) / sizes[source]
            for source, name in enumerate(self.sources)
        }
        if self.selected_rows is not None:
            epochs[SELECTED] = position.stage1_rows / sum(self.selected_rows.sizes().values())
        return epochs

    def batch(self, step: int) -> features.Batch:
        """The batch of a step, read at once."""
        draws = self.draws(step)
        rows = self._read(draws)
        if self.denoising is None:
            batch = features.make_batch(rows, self.start_id)
            return batch | self._labels(step, batch)
        # A row that stage 1 selected is denoised in another way when it comes among all rows.
        own = step < self.stage1_steps and self.selected_rows is not None
        first = _SELECTED_EPOCHS if own else 0
        denoised = [
            self.denoising(row, first + draw.epoch) for row, draw in zip(rows, draws, strict=True)
        ]
        batch = features.make_batch([one.row for one in denoised], self.start_id)
        return batch | self.denoising.batch_features(denoised)

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

    def _labels(self, step: int, batch: features.Batch) -> features.Batch:
        if self.soft_labels is None or step >= self.stage1_steps:
            return {}
        labels = self.soft_labels.read(batch["row_id"])
        return {f"soft_{name}": array for name, array in labels._asdict().items()}

    def _read(self, draws: Sequence[Draw]) -> list[features.Row]:
        """The rows drawn, in order; one read a source."""
        splits = list(self.sources.values())
        places: Mapping[int, list[int]] = collections.defaultdict(list)
        for place, draw in enumerate(draws):
            places[draw.source].append(place)
        rows: dict[int, features.Row] = {}
        for source, of_source in places.items():
            read = splits[source].__getitems__([draws[place].row_id for place in of_source])
            rows.update(zip(of_source, read, strict=True))
        return [rows[place] for place in range(len(draws))]


def in_order(
    split: Any,
    batch_size: int,
    start_id: int,
    rows: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[features.Batch]:
    """The first `rows` rows of a split (all by default) once, in order, in equal batches.

    The last batch is filled up with copies of its last row that have no loss weight and row id −1.
    Of every batch this is one of `parts` equal, contiguous parts.
    """
    total = len(split) if rows is None else min(rows, len(split))
    count = batch_size // parts
    for first in range(0, total, batch_size):
        places = np.arange(first + part * count, first + (part + 1) * count)
        batch = features.make_batch(
            split.__getitems__(np.minimum(places, total - 1).tolist()), start_id
        )
        batch["loss_weights"][places >= total] = 0.0
        batch["row_id"][places >= total] = -1
        yield batch
