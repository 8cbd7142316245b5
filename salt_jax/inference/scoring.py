"""Scoring: a frozen model and the rows of a split in; columns of a number a row out, in shards."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data import input_pipeline
from salt_jax.data.features import Batch
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import SUBSET, TARGETS_HASH, RowScoresWriter, targets_hash
from salt_jax.distill import chunked_loss, losses, scores
from salt_jax.models import decoder
from salt_jax.training import in_order, partitioning
from salt_jax.training.finite import NotFiniteError


def score_rows(
    config: decoder.DecoderConfig,
    params: Any,
    cache: PackedCache,
    split: str,
    row_scores: Sequence[scores.Score],
    writer: RowScoresWriter,
    batch_size: int,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
    worker: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
    allow_nan: bool = False,
) -> None:
    """Scores the rows of those shards of a worker that are not finished.

    Each shard is cut into batches from its first row on, so that what it holds depends neither on
    where a pass was stopped nor on how many workers there are.

    Args:
      config: The scoring model.
      params: Its parameters, on the mesh.
      cache: The rows.
      split: Which of its splits.
      row_scores: See `distill.scores`.
      writer: Takes the shards, and knows which are missing; begun.
      batch_size: Rows at once, rounded up to what the mesh needs.
      mesh: Where to compute: devices of this process alone.
      rules: From logical to mesh axes.
      chunk_tokens: Tokens whose logits a device holds at once.
      worker: Which of the workers this is.
      workers: How many share the pass.
      progress: Called with the number of rows after each batch.
      allow_nan: Whether rows may have NaN for scores.

    Raises:
      NotFiniteError: The model's losses on some rows are not finite.
    """
    program = jax.jit(scoring_program(config, row_scores, mesh, rules, chunk_tokens))
    rows, size = cache.split(split), in_order.rounded_up(batch_size, mesh)
    pending = writer.shards.unfinished(worker, workers)
    ranges = [in_order.RowsOf(rows, shard.rows) for shard in pending]
    batches = (
        batch for part in ranges for batch in input_pipeline.in_order(part, size, cache.start_id)
    )
    results = in_order.over_batches(program, params, batches, mesh, rules)
    names = [score.name for score in row_scores]
    start = time.perf_counter()
    for shard in pending:
        parts = []
        for _ in range(0, len(shard.rows), size):
            batch, values_CxB = next(results)
            if not allow_nan:
                _require_numbers(batch["row_id"], values_CxB, split)
            parts.append(_columns(batch, dict(zip(names, values_CxB, strict=True))))
            progress(len(parts[-1][SUBSET]))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        now = time.perf_counter()
        writer.write(shard, columns, {"seconds": now - start, "workers": workers})
        start = now


def scoring_program(
    config: decoder.DecoderConfig,
    row_scores: Sequence[scores.Score],
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
) -> Callable[..., Any]:
    """A function (params, batch) → `scores.row_scores`, to be jitted for the mesh."""
    sharding = partitioning.head_sharding(mesh, rules)
    entropy = any(scores.ENTROPY in score.needs for score in row_scores)

    def program(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        values = chunked_loss.target_ranks(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            config.vocab_size or 0,
            chunk_tokens=chunk_tokens,
            sharding=sharding,
            entropy=entropy,
        )
        tokens = dict(zip(scores.TOKEN_VALUES, values, strict=False))
        return scores.row_scores(tokens, batch["loss_weights"], row_scores)

    return program


def own_mesh(config: partitioning.MeshConfig) -> Mesh:
    """The mesh of this process's own devices: workers score shards of their own, independently.

    Among several processes the mesh as set would be of the devices of all: of it the tensor axis
    stays, and the others are fsdp over what this process has.
    """
    if jax.process_count() > 1:
        config = partitioning.MeshConfig(tensor=config.tensor)
    return config.make(jax.local_devices())


def _require_numbers(row_ids_B: np.ndarray, values_CxB: np.ndarray, split: str) -> None:
    # −∞ is the score of a row without a learnable token.
    broken_n = row_ids_B[~(values_CxB < np.inf).all(axis=0) & (row_ids_B >= 0)]
    if len(broken_n):
        raise NotFiniteError(
            f"The scorer's losses are not finite on {len(broken_n)} of the rows {row_ids_B[0]} to "
            f"{row_ids_B.max()} of {split}, the first of them {broken_n[0]}: name another "
            "--scorer_step, or add --allow_nan=True to score the others."
        )


def _columns(batch: Batch, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All columns of the batch's rows, filling left out."""
    real_B = batch["row_id"] >= 0
    hashes = _hashes(batch["targets"][real_B], batch["segment_ids"][real_B])
    return {
        TARGETS_HASH: np.array(list(hashes), np.uint64),
        SUBSET: batch["subset"][real_B].astype(np.uint16),
        **{name: values_B[real_B] for name, values_B in values.items()},
    }


def _hashes(targets_BxL: np.ndarray, segment_ids_BxL: np.ndarray) -> Iterator[int]:
    for targets_L, segment_ids_L in zip(targets_BxL, segment_ids_BxL, strict=True):
        yield targets_hash(targets_L, segment_ids_L)
