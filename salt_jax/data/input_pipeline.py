"""The input pipeline: batches as a pure function of the step and the rows read so far.

A position counts rows, not steps, so a run may resume with another batch size, other hosts or more
reader threads, and no row is read twice or skipped.

Both stages read the all-rows order at the total number of rows consumed, except that a stage 1 with
selected rows (SALT_DS) reads their order at the number of rows consumed in stage 1. With a constant
batch size B that is position i·B at step i, so all arms of a comparison read the same rows at the
same step, except SALT_DS in stage 1.
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

# Denoising's epoch offset for selected rows, more epochs than any order reaches.
_SELECTED_EPOCHS = 1 << 31

# The name of stage 1's selected rows in `epochs`.
SELECTED = "selected rows"


@dataclasses.dataclass(frozen=True)
class Position:
    """Steps completed, and rows consumed in each stage by all processes."""

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
      sources: The split (`PackedSplit`) of each cache by name, in the order of `Draw.source`.
      batch_size: B, rows of the global batch.
      start_id: The model's input where a segment begins.
      all_rows: The order of stage 2, and of stage 1 without selected_rows.
      selected_rows: Stage 1's own order (SALT_DS), or None.
      unused_rows: Stage 2's own order, read at the number of rows consumed in stage 2; None means
        all_rows.
      stage1_steps: Length of stage 1, which also reads the soft labels.
      start: The position at which this pipeline starts; earlier batches are not available.
      denoising: Transforms rows between the cache and the batch; None for no transform.
      soft_labels: Stored labels to add to batches of stage 1, in place of a teacher.
      part: Which of the `parts` equal, contiguous parts of every batch to read.
      parts: How many parts there are: one per process, unless some hold the same rows.
      read_threads: Threads that read ahead.
      read_ahead: Batches to prefetch.
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
        """The features of batches beside `features.make_batch`'s."""
        return self.denoising.features if self.denoising else ()

    def position(self, step: int) -> Position:
        """The position after `step` completed steps."""
        assert step >= self.start.step, f"step {step} of a pipeline from step {self.start.step}"
        in_stage1 = max(0, min(step, self.stage1_steps) - self.start.step)
        in_stage2 = step - self.start.step - in_stage1
        return Position(
            step,
            self.start.stage1_rows + in_stage1 * self.batch_size,
            self.start.stage2_rows + in_stage2 * self.batch_size,
        )

    def draws(self, step: int) -> list[Draw]:
        """The draws of this process at a step, in order."""
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
        """Epochs completed of each source after `step` steps.

        Selected rows are counted separately, as SELECTED; with unused_rows, an epoch of a source is
        one pass over its unused rows.
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
        # So that a selected row is denoised differently when it recurs among all rows.
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
        """The rows drawn, in order; each source is read once."""
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
    """The first `rows` rows of a split (all by default) once, in order, in equal batches, of which
    it yields one of `parts` equal, contiguous parts.

    The last batch is padded with copies of its last row, with loss weight 0 and row id −1.
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
