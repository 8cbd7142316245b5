"""Scoring: a frozen model and the rows of a split in; one float32 a row out, by row id."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import chunked_loss, losses, scores
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.in_order import over_rows


def score_rows(
    config: decoder.DecoderConfig,
    params: Any,
    cache: PackedCache,
    split: str,
    score: scores.ScoreConfig,
    batch_size: int,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
) -> np.ndarray:
    """METHOD.md's S(x) of every row.

    Args:
      config: The scoring model.
      params: Its parameters, on the mesh.
      cache: The rows.
      split: Which of its splits.
      score: The score's options.
      batch_size: Rows at once, rounded up to what the mesh needs.
      mesh: Where to compute.
      rules: From logical to mesh axes.
      chunk_tokens: Tokens whose logits a device holds at once.

    Returns:
      float32 [N], in nats; −inf where nothing was learnable.
    """
    scores_N = np.full(len(cache.split(split)), -np.inf, np.float32)
    program = jax.jit(scoring_program(config, score, mesh, rules, chunk_tokens))
    for batch, scores_B in over_rows(program, params, cache, split, batch_size, mesh, rules):
        real_B = batch["row_id"] >= 0
        scores_N[batch["row_id"][real_B]] = scores_B[real_B]
    return scores_N


def scoring_program(
    config: decoder.DecoderConfig,
    score: scores.ScoreConfig,
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
) -> Callable[..., Any]:
    """A function (params, batch) → scores, float32 [B], to be jitted for the mesh."""
    sharding = partitioning.head_sharding(mesh, rules)

    def program(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        loss_BxL, greater_BxL = chunked_loss.target_ranks(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            config.vocab_size or 0,
            chunk_tokens=chunk_tokens,
            sharding=sharding,
        )
        return scores.row_scores(loss_BxL, greater_BxL, batch["loss_weights"], score)

    return program
