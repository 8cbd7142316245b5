"""Soft labelling: a pass of a frozen teacher that stores its top-k probabilities, in shards."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.data.features import Batch
from salt_jax.data.label_format import Labels
from salt_jax.data.soft_labels import SoftLabelsWriter
from salt_jax.distill import chunked_loss
from salt_jax.inference.model_pass import ModelPass
from salt_jax.models import decoder
from salt_jax.training import partitioning

# The lowest float16 is stored for log 0.
_LOWEST = float(np.finfo(np.float16).min)


def label_rows(
    rows: ModelPass, params: Any, k: int, temperature: float, writer: SoftLabelsWriter
) -> None:
    """Labels the rows of this worker's unfinished shards, with `k` ids per token at temperature τ.

    `params` are on the mesh; `writer` is already begun and knows which shards are unfinished.
    """

    def program(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        labels = chunked_loss.top_labels(
            decoder.hidden_states(rows.config, params, batch),
            decoder.head_kernel(params, rows.config),
            batch["targets"],
            batch["loss_weights"],
            rows.config.vocab_size or 0,
            k=k,
            temperature=temperature,
            chunk_tokens=rows.chunk_tokens,
            sharding=partitioning.head_sharding(rows.mesh, rows.rules),
            soft_cap=rows.config.logits_soft_cap,
        )
        floats = (labels.log_q, labels.rest, labels.teacher_hard)
        return labels.ids, *(_half(x, batch["loss_weights"]) for x in floats)

    def labels_of(results: Iterable[tuple[Batch, Any]]) -> Iterator[Labels]:
        for batch, arrays in results:
            real_B = batch["row_id"] >= 0
            yield Labels(*(array[real_B] for array in arrays))
            rows.progress(int(real_B.sum()))

    shards = writer.unfinished(rows.worker, rows.workers)
    results = rows.results(program, params, [writer.row_ids(shard) for shard in shards])
    for shard, of_shard in zip(shards, results, strict=True):
        writer.write(shard, labels_of(of_shard), rows.workers)


def _half(x: jax.Array | None, weights_BxL: jax.Array) -> jax.Array:
    """float16, clipped to its range; NaN if not finite, and 0 where the loss weight is 0."""
    assert x is not None, "a teacher says how well it does"
    counts_BxL = (weights_BxL > 0).reshape(*weights_BxL.shape, *(1,) * (x.ndim - 2))
    clipped = jnp.where(jnp.isfinite(x), jnp.clip(x, _LOWEST, -_LOWEST), jnp.nan)
    return jnp.where(counts_BxL, clipped, 0.0).astype(jnp.float16)
