"""Soft labels of rows: a frozen teacher and rows in; what is kept of its logits out, in shards."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.data import input_pipeline
from salt_jax.data.label_format import Labels
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.soft_labels import SoftLabelsWriter
from salt_jax.distill import chunked_loss, losses
from salt_jax.models import decoder
from salt_jax.storage.restartable_shards import Shard
from salt_jax.training import in_order, partitioning

# float16's lowest number stands for log 0.
_LOWEST = float(np.finfo(np.float16).min)


def label_rows(
    config: decoder.DecoderConfig,
    params: Any,
    cache: PackedCache,
    split: str,
    k: int,
    temperature: float,
    writer: SoftLabelsWriter,
    batch_size: int,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
    worker: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Labels the rows of those shards of a worker that are not finished.

    Args:
      config: The teacher.
      params: Its parameters, on the mesh.
      cache: The rows.
      split: Which of its splits.
      k: K, ids a token.
      temperature: τ.
      writer: Takes the shards, and knows which are missing; begun.
      batch_size: Rows at once, rounded up to what the mesh needs.
      mesh: Where to compute: devices of this process alone.
      rules: From logical to mesh axes.
      chunk_tokens: Tokens whose logits a device holds at once.
      worker: Which of the workers this is.
      workers: How many share the pass.
      progress: Called with the number of rows after each batch.
    """
    program = jax.jit(labelling_program(config, k, temperature, mesh, rules, chunk_tokens))
    size = in_order.rounded_up(batch_size, mesh)
    pending = writer.shards.unfinished(worker, workers)
    parts = [in_order.RowsOf(cache.split(split), writer.row_ids(shard)) for shard in pending]
    batches = (b for part in parts for b in input_pipeline.in_order(part, size, cache.start_id))
    results = in_order.over_batches(program, params, batches, mesh, rules)

    def labels_of(shard: Shard) -> Iterator[Labels]:
        for _ in range(0, len(shard.rows), size):
            batch, arrays = next(results)
            real_B = batch["row_id"] >= 0
            yield Labels(*(array[real_B] for array in arrays))
            progress(int(real_B.sum()))

    for shard in pending:
        writer.write(shard, labels_of(shard), workers)


def labelling_program(
    config: decoder.DecoderConfig,
    k: int,
    temperature: float,
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
) -> Callable[..., Any]:
    """A function (params, batch) → Labels, to be jitted for the mesh."""
    sharding = partitioning.head_sharding(mesh, rules)

    def program(params: Any, batch: Mapping[str, jax.Array]) -> Any:
        labels = chunked_loss.top_labels(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            config.vocab_size or 0,
            k=k,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            sharding=sharding,
        )
        floats = (labels.log_q, labels.rest, labels.teacher_hard)
        return labels.ids, *(_half(x, batch["loss_weights"]) for x in floats)

    return program


def _half(x: jax.Array | None, weights_BxL: jax.Array) -> jax.Array:
    """float16, within its range; NaN for what is not finite, and 0 where nothing is trained on."""
    assert x is not None, "a teacher says how well it does"
    counts_BxL = (weights_BxL > 0).reshape(*weights_BxL.shape, *(1,) * (x.ndim - 2))
    within = jnp.where(jnp.isfinite(x), jnp.clip(x, _LOWEST, -_LOWEST), jnp.nan)
    return jnp.where(counts_BxL, within, 0.0).astype(jnp.float16)
