"""Evaluation on held-out rows: log-perplexity, bits per byte and accuracy, also by subset."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import chunked_loss, losses
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.finite import NotFiniteError
from salt_jax.training.in_order import over_rows


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts some text.

    Attributes:
      log_perplexity: Mean −log p of the true next token, nats per token.
      next_token_accuracy: Share of tokens that the model's first choice gets right, 0 to 1.
      bits_per_byte: The same loss in bits, over the UTF-8 bytes that the tokens stand for: what
        models of different vocabularies may be compared by. NaN where they stand for none.
      tokens: Tokens with loss weight.
      bytes: Their bytes; an end of document has none.
    """

    log_perplexity: float
    next_token_accuracy: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, sums_4: np.ndarray) -> "Quality":
        """From sums over tokens: of nats, of right predictions, of weights and of bytes."""
        loss, correct, weight, size = (float(x) for x in sums_4)
        return cls(
            loss / max(weight, 1.0),
            correct / max(weight, 1.0),
            loss / math.log(2) / size if size else math.nan,
            round(weight),
            round(size),
        )

    def sums(self) -> np.ndarray:
        """What `of` made it from, float64[4]."""
        shares = (self.log_perplexity, self.next_token_accuracy, 1.0)
        return np.array([*(self.tokens * share for share in shares), self.bytes])


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Quality on a split, and on each subset of it that has tokens."""

    whole: Quality
    by_subset: Mapping[str, Quality]

    def to_json(self) -> dict[str, Any]:
        """As metrics.jsonl and summary.json hold it."""
        return {
            "log_perplexity": self.whole.log_perplexity,
            "next_token_accuracy": self.whole.next_token_accuracy,
            "bits_per_byte": self.whole.bits_per_byte,
            "evaluated_tokens": self.whole.tokens,
            "evaluated_bytes": self.whole.bytes,
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
        cache.split(split)  # refuses a split that is not there
        lengths_V = cache.vocabulary.byte_lengths
        subsets = len(cache.subsets)
        self._sums = jax.jit(
            _subset_sums(config, subsets, lengths_V, mesh, rules, chunk_tokens),
            out_shardings=partitioning.replicated(mesh),
        )

    def __call__(self, params: Any, rows: int | None = None) -> EvaluationResult:
        """Evaluates `rows` rows, or as many as it was made for; `params` lie on the mesh.

        Raises:
          NotFiniteError: The model's losses on some rows are not finite.
        """
        sums_4xS = np.zeros((4, len(self._cache.subsets)), np.float64)
        for batch, batch_sums_4xS in over_rows(
            self._sums,
            params,
            self._cache,
            self._split,
            self._batch_size,
            self._mesh,
            self._rules,
            rows or self._rows,
        ):
            if not np.isfinite(batch_sums_4xS).all():
                self._refuse(batch["row_id"])
            sums_4xS += batch_sums_4xS
        by_subset = {
            name: Quality.of(sums_4xS[:, i])
            for i, name in enumerate(self._cache.subsets)
            if sums_4xS[2, i] > 0
        }
        return EvaluationResult(Quality.of(sums_4xS.sum(axis=1)), by_subset)

    def _refuse(self, row_ids_B: np.ndarray) -> NoReturn:
        read = row_ids_B[row_ids_B >= 0]
        raise NotFiniteError(
            f"The model's losses are not finite among the rows {read.min()} to {read.max()} of "
            f"{self._split} of {self._cache.path}: use another checkpoint."
        )


class MixtureEvaluator:
    """Evaluates on several caches as one; their subsets are named CACHE/SUBSET.

    Args:
      evaluators: One for each cache, by its name.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator]) -> None:
        self._evaluators = dict(evaluators)

    def __call__(self, params: Any, rows: int | None = None) -> EvaluationResult:
        """Evaluates `rows` rows of each, or as many as each was made for."""
        by_subset = {
            f"{name}/{subset}": quality
            for name, evaluator in self._evaluators.items()
            for subset, quality in evaluator(params, rows).by_subset.items()
        }
        sums_4 = sum((quality.sums() for quality in by_subset.values()), np.zeros(4))
        return EvaluationResult(Quality.of(sums_4), by_subset)


def _subset_sums(
    config: decoder.DecoderConfig,
    subsets: int,
    byte_lengths_V: np.ndarray,
    mesh: Mesh,
    rules: partitioning.Rules,
    chunk_tokens: int,
) -> Any:
    """(params, batch) → float32 [4, S]: loss, correct predictions, weight and bytes by subset."""
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
        bytes_BxL = jnp.where(weights_BxL > 0, jnp.asarray(byte_lengths_V)[batch["targets"]], 0)
        rows_4xB = jnp.stack(
            [
                jnp.sum(jnp.where(weights_BxL > 0, loss_BxL * weights_BxL, 0), axis=1),
                jnp.sum((greater_BxL == 0) * weights_BxL, axis=1),
                jnp.sum(weights_BxL, axis=1),
                jnp.sum(bytes_BxL, axis=1).astype(jnp.float32),
            ]
        )
        return jax.vmap(
            lambda row_B: jax.ops.segment_sum(row_B, batch["subset"], num_segments=subsets)
        )(rows_4xB)

    return sums
