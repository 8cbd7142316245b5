"""A frozen model over the rows of a split, in order: what evaluation and scoring have in common."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data import input_pipeline
from salt_jax.data.features import Batch, Row
from salt_jax.data.packed_cache import PackedCache, PackedSplit
from salt_jax.training import partitioning

_FEATURES = ("inputs", "targets", "loss_weights", "segment_ids", "positions", "subset")


@dataclasses.dataclass(frozen=True)
class RowsOf:
    """Some rows of a split, by their ids there, as if they were a split."""

    split: PackedSplit
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return self.split.__getitems__([self.rows[index] for index in indices])


def over_rows(
    program: Callable[[Any, Any], jax.Array],
    params: Any,
    cache: PackedCache,
    split: str,
    batch_size: int,
    mesh: Mesh,
    rules: partitioning.Rules,
    rows: int | None = None,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Runs (params, batch) → array over the first `rows` rows of a split, all by default.

    See `over_batches`; batches are of batch_size rows, rounded up to what the mesh needs. Among
    several processes each gets its own part of every batch.
    """
    size = rounded_up(batch_size, mesh)
    part = partitioning.batch_part(mesh)
    batches = input_pipeline.in_order(cache.split(split), size, cache.start_id, rows, *part)
    return over_batches(program, params, batches, mesh, rules)


def over_batches(
    program: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    rules: partitioning.Rules,
) -> Iterator[tuple[Batch, Any]]:
    """Runs (params, batch) → arrays over batches, one ahead of what it gives.

    Args:
      program: A jitted function of parameters and a batch on the devices.
      params: On the mesh.
      batches: On the host (see `input_pipeline.in_order`).
      mesh: Where to compute.
      rules: From logical to mesh axes.

    Yields:
      Each batch and its result, both on the host.
    """
    pending: tuple[Batch, Any] | None = None
    for batch in batches:
        with partitioning.partitioned(mesh, rules):
            on_device = partitioning.to_device({name: batch[name] for name in _FEATURES}, mesh)
            dispatched = program(params, on_device)
        if pending is not None:
            yield pending[0], jax.tree.map(np.asarray, pending[1])
        pending = batch, dispatched
    if pending is not None:
        yield pending[0], jax.tree.map(np.asarray, pending[1])


def rounded_up(batch_size: int, mesh: Mesh) -> int:
    """Rows of a batch that the mesh can split."""
    divisor = partitioning.batch_divisor(mesh)
    return -(-batch_size // divisor) * divisor
