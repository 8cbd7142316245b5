"""Scoring: a frozen model and the rows of a split in; one float32 a row out, by row id."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.input_pipeline import in_order
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import scores
from salt_jax.models import decoder
from salt_jax.training import partitioning

_FEATURES = ("inputs", "targets", "loss_weights", "segment_ids", "positions")


def score_rows(
    config: decoder.DecoderConfig,
    params: Any,
    cache: PackedCache,
    split: str,
    score: scores.ScoreConfig,
    batch_size: int,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    on_batch: Callable[[int], None] = lambda rows: None,
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
      on_batch: Called with the number of rows scored so far.

    Returns:
      float32 [N], in nats; −inf where nothing was learnable.
    """
    rows = cache.split(split)
    divisor = partitioning.batch_divisor(mesh)
    batch_size = -(-batch_size // divisor) * divisor
    scores_N = np.full(len(rows), -np.inf, np.float32)
    program = jax.jit(_score_program(config, score))
    done = 0

    def store(row_ids_B: np.ndarray, scores_B: jax.Array) -> None:
        nonlocal done
        real_B = row_ids_B >= 0
        scores_N[row_ids_B[real_B]] = np.asarray(scores_B)[real_B]
        done += int(real_B.sum())
        on_batch(done)

    with partitioning.partitioned(mesh, rules):
        pending: tuple[np.ndarray, jax.Array] | None = None
        for batch in in_order(rows, batch_size, cache.start_id):
            on_device = partitioning.to_device({n: batch[n] for n in _FEATURES}, mesh)
            dispatched = (batch["row_id"], program(params, on_device))
            if pending is not None:
                store(*pending)
            pending = dispatched
        if pending is not None:
            store(*pending)
    return scores_N


def _score_program(config: decoder.DecoderConfig, score: scores.ScoreConfig) -> Callable[..., Any]:

    def program(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        hidden_BxLxD = decoder.hidden_states(config, params, batch)
        logits_BxLxV = decoder.logits(hidden_BxLxD, decoder.head_kernel(params, config), config)
        return scores.row_scores(
            logits_BxLxV,
            batch["targets"],
            batch["loss_weights"],
            k=score.k,
            vocab_size=config.vocab_size or 0,
            unlearnable=score.unlearnable,
            min_learnable_fraction=score.min_learnable_fraction,
        )

    return program
