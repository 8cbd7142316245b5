"""Evaluation: a model and held-out rows in; log-perplexity and accuracy out, also by subset."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import chunked_loss, losses
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.in_order import over_rows


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts some text.

    Attributes:
      log_perplexity: Mean −log p of the true next token, nats per token.
      next_token_accuracy: Share of tokens that the model's first choice gets right, 0 to 1.
      tokens: Tokens with loss weight.
    """

    log_perplexity: float
    next_token_accuracy: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Quality on a split, and on each subset of it that has tokens."""

    whole: Quality
    by_subset: Mapping[str, Quality]

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl and summary.json hold it."""
        return {
            "log_perplexity": self.whole.log_perplexity,
            "next_token_accuracy": self.whole.next_token_accuracy,
            "evaluated_tokens": self.whole.tokens,
            "by_subset": {name: dataclasses.asdict(q) for name, q in self.by_subset.items()},
        }


class Evaluator:
    """Evaluates parameters of one model on a split of one cache.

    Args:
      config: The model.
      cache: The rows.
      split: "validation" or "test".
      batch_size: Rows at once, rounded up to what the mesh needs.
      mesh: Where the parameters live.
      rules: From logical to mesh axes.
      rows: How many rows to read, from the first on; all by default.
      chunk_tokens: Tokens whose logits a device holds at once.
    """

    def __init__(
        self,
        config: decoder.DecoderConfig,
        cache: PackedCache,
        split: str,
        batch_size: int,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        rows: int | None = None,
        chunk_tokens: int = losses.LossConfig.chunk_tokens,
    ) -> None:
        self._cache, self._split, self._rows = cache, split, rows
        self._batch_size, self._mesh, self._rules = batch_size, mesh, rules
        self._sums = jax.jit(_subset_sums(config, len(cache.subsets), mesh, rules, chunk_tokens))
        cache.split(split)  # refuses a split that is not there

    def __call__(self, params: Any, rows: int | None = None) -> Evaluation:
        """Evaluates `rows` rows, or as many as it was made for; `params` lie on the mesh."""
        sums_3xS = np.zeros((3, len(self._cache.subsets)), np.float64)
        for _, batch_sums_3xS in over_rows(
            self._sums,
            params,
            self._cache,
            self._split,
            self._batch_size,
            self._mesh,
            self._rules,
            rows or self._rows,
        ):
            sums_3xS += batch_sums_3xS
        by_subset = {
            name: _quality(sums_3xS[:, i])
            for i, name in enumerate(self._cache.subsets)
            if sums_3xS[2, i] > 0
        }
        return Evaluation(_quality(sums_3xS.sum(axis=1)), by_subset)


class MixtureEvaluator:
    """Evaluates on several caches as one; their subsets are named CACHE/SUBSET.

    Args:
      evaluators: One for each cache, by its name.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator]) -> None:
        self._evaluators = dict(evaluators)

    def __call__(self, params: Any, rows: int | None = None) -> Evaluation:
        """Evaluates `rows` rows of each, or as many as each was made for."""
        by_subset = {
            f"{name}/{subset}": quality
            for name, evaluator in self._evaluators.items()
            for subset, quality in evaluator(params, rows).by_subset.items()
        }
        sums_3 = np.zeros(3)
        for quality in by_subset.values():
            shares = (quality.log_perplexity, quality.next_token_accuracy, 1.0)
            sums_3 += quality.tokens * np.array(shares)
        return Evaluation(_quality(sums_3), by_subset)


def _subset_sums(
    config: decoder.DecoderConfig,
    subsets: int,
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
) -> Any:
    """(params, batch) → float32 [3, S]: loss, correct predictions and weight, summed by subset."""
    sharding = partitioning.head_sharding(mesh, rules)

    def sums(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        weights_BxL = batch["loss_weights"]
        loss_BxL, greater_BxL = chunked_loss.target_ranks(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            weights_BxL,
            config.vocab_size or 0,
            chunk_tokens=chunk_tokens,
            sharding=sharding,
        )
        rows_3xB = jnp.stack(
            [
                jnp.sum(jnp.where(weights_BxL > 0, loss_BxL * weights_BxL, 0), axis=1),
                jnp.sum((greater_BxL == 0) * weights_BxL, axis=1),
                jnp.sum(weights_BxL, axis=1),
            ]
        )
        return jax.vmap(
            lambda row_B: jax.ops.segment_sum(row_B, batch["subset"], num_segments=subsets)
        )(rows_3xB)

    return sums


def _quality(sums_3: np.ndarray) -> Quality:
    loss, correct, weight = (float(x) for x in sums_3)
    return Quality(loss / max(weight, 1.0), correct / max(weight, 1.0), round(weight))
