"""Scoring: a pass of a frozen model that writes one number per row and score, in shards."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.features import Batch
from salt_jax.data.row_scores import SUBSET, TARGETS_HASH, RowScoresWriter, targets_hash
from salt_jax.distill import scores
from salt_jax.inference.model_pass import ModelPass
from salt_jax.models import decoder
from salt_jax.training import in_order, partitioning
from salt_jax.training.finite import NotFiniteError


def score_rows(
    rows: ModelPass,
    params: Any,
    row_scores: Sequence[scores.Score],
    writer: RowScoresWriter,
    allow_nan: bool = False,
) -> None:
    """Scores the rows of this worker's unfinished shards.

    Args:
      rows: The pass.
      params: The scorer's parameters, on the mesh.
      row_scores: The scores; see `distill.scores`.
      writer: Writes the shards and knows which are unfinished; already begun.
      allow_nan: Whether rows may have NaN scores.

    Raises:
      NotFiniteError: The model's losses on some rows are not finite.
    """
    program = scoring_program(rows.config, row_scores, rows.mesh, rows.rules, rows.chunk_tokens)
    names = [score.name for score in row_scores]
    shards = writer.unfinished(rows.worker, rows.workers)
    start = time.perf_counter()
    results = rows.results(program, params, [shard.rows for shard in shards])
    for shard, of_shard in zip(shards, results, strict=True):
        parts = []
        for batch, values_CxB in of_shard:
            if not allow_nan:
                _require_numbers(batch["row_id"], values_CxB, rows.split)
            parts.append(_columns(batch, dict(zip(names, values_CxB, strict=True))))
            rows.progress(len(parts[-1][SUBSET]))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        now = time.perf_counter()
        writer.write(shard, columns, {"seconds": now - start, "workers": rows.workers})
        start = now


def scoring_program(
    config: decoder.DecoderConfig,
    row_scores: Sequence[scores.Score],
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
) -> Callable[..., Any]:
    """A function (params, batch) → `scores.row_scores`, to be jitted on the mesh."""
    entropy = any(scores.ENTROPY in score.needs for score in row_scores)

    def program(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        values = in_order.ranks_of_batch(config, params, batch, mesh, rules, chunk_tokens, entropy)
        tokens = dict(zip(scores.TOKEN_VALUES, values, strict=False))
        return scores.row_scores(tokens, batch["loss_weights"], row_scores)

    return program


def _require_numbers(row_ids_B: np.ndarray, values_CxB: np.ndarray, split: str) -> None:
    # −∞ is valid: the score of a row without a learnable token.
    broken_n = row_ids_B[~(values_CxB < np.inf).all(axis=0) & (row_ids_B >= 0)]
    if len(broken_n):
        raise NotFiniteError(
            f"The scorer's losses are not finite on {len(broken_n)} of the rows {row_ids_B[0]} to "
            f"{row_ids_B.max()} of {split}, the first of them {broken_n[0]}: name another "
            "--scorer_step, or add --allow_nan=True to score the others."
        )


def _columns(batch: Batch, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All columns of a batch's rows, without filler rows."""
    real_B = batch["row_id"] >= 0
    rows = zip(batch["targets"][real_B], batch["segment_ids"][real_B], strict=True)
    return {
        TARGETS_HASH: np.array([targets_hash(*row) for row in rows], np.uint64),
        SUBSET: batch["subset"][real_B].astype(np.uint16),
        **{name: values_B[real_B] for name, values_B in values.items()},
    }
