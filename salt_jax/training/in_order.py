"""Forward passes of a frozen model over batches in order, for evaluation and scoring."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.features import Batch
from salt_jax.distill import chunked_loss
from salt_jax.models import decoder
from salt_jax.training import partitioning

_FEATURES = ("inputs", "targets", "loss_weights", "segment_ids", "positions", "subset")
# Optional feature, int32 [B, T]: the places in a row that `targets`, then [B, T] too, come after.
SCORED_PLACES = "scored_places"


def over_batches(
    program: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    rules: partitioning.Rules,
) -> Iterator[tuple[Batch, Any]]:
    """Runs a jitted function (params, batch) → arrays over batches, one ahead of what it yields.

    `params` are on the mesh. Yields each batch and its result, both on the host.
    """
    pending: tuple[Batch, Any] | None = None
    for batch in batches:
        with partitioning.partitioned(mesh, rules):
            names = (*_FEATURES, *([SCORED_PLACES] if SCORED_PLACES in batch else []))
            on_device = partitioning.to_device({name: batch[name] for name in names}, mesh)
            dispatched = program(params, on_device)
        if pending is not None:
            yield pending[0], jax.tree.map(np.asarray, pending[1])
        pending = batch, dispatched
    if pending is not None:
        yield pending[0], jax.tree.map(np.asarray, pending[1])


def ranks_of_batch(
    config: decoder.DecoderConfig,
    params: Any,
    batch: Mapping[str, jax.Array],
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """`chunked_loss.target_ranks` of a model on a batch, inside a jitted program."""
    hidden_BxLxD = decoder.hidden_states(config, params, batch)
    if (places_BxT := batch.get(SCORED_PLACES)) is not None:
        hidden_BxLxD = jnp.take_along_axis(hidden_BxLxD, places_BxT[..., None], axis=1)
    return chunked_loss.target_ranks(
        hidden_BxLxD,
        decoder.head_kernel(params, config),
        batch["targets"],
        batch["loss_weights"],
        config.vocab_size or 0,
        chunk_tokens=chunk_tokens,
        sharding=partitioning.head_sharding(mesh, rules),
        soft_cap=config.logits_soft_cap,
        entropy=entropy,
    )


def rounded_up(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the devices that the mesh splits a batch over."""
    divisor = partitioning.batch_divisor(mesh)
    return -(-batch_size // divisor) * divisor
