"""A frozen model over the rows of a split, in order: what evaluation and scoring have in common."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data import input_pipeline
from salt_jax.data.features import Batch
from salt_jax.data.packed_cache import PackedCache
from salt_jax.training import partitioning

_FEATURES = ("inputs", "targets", "loss_weights", "segment_ids", "positions", "subset")


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
    """Runs (params, batch) → array over a split, one batch ahead of what it gives.

    Args:
      program: A jitted function of parameters and a batch on the devices.
      params: On the mesh.
      cache: The rows.
      split: Which of its splits.
      batch_size: Rows at once, rounded up to what the mesh needs.
      mesh: Where to compute.
      rules: From logical to mesh axes.
      rows: How many rows to read, from the first on; all by default.

    Yields:
      Each batch (see `input_pipeline.in_order`) and its result, both on the host.
    """
    divisor = partitioning.batch_divisor(mesh)
    batch_size = -(-batch_size // divisor) * divisor
    pending: tuple[Batch, jax.Array] | None = None
    for batch in input_pipeline.in_order(cache.split(split), batch_size, cache.start_id, rows):
        with partitioning.partitioned(mesh, rules):
            on_device = partitioning.to_device({name: batch[name] for name in _FEATURES}, mesh)
            dispatched = program(params, on_device)
        if pending is not None:
            yield pending[0], np.asarray(pending[1])
        pending = batch, dispatched
    if pending is not None:
        yield pending[0], np.asarray(pending[1])
