"""Evaluation on held-out rows: log-perplexity, bits per byte and accuracy, also by subset."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.data import input_pipeline
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.finite import NotFiniteError
from salt_jax.training.in_order import over_batches, ranks_of_batch, rounded_up


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well a model predicts some text.

    Attributes:
      log_perplexity: Mean −log p of the next token, nats per token.
      next_token_accuracy: Share of tokens that the model ranks first, 0 to 1.
      bits_per_byte: The loss in bits over the UTF-8 bytes of the tokens, comparable between
        vocabularies; NaN without bytes.
      tokens: Tokens with loss weight.
      bytes: Their UTF-8 bytes; an end of document has none.
    """

    log_perplexity: float
    next_token_accuracy: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, sums_4: np.ndarray) -> "Quality":
        """From sums over tokens of nats, correct predictions, weights and bytes."""
        loss, correct, weight, size = (float(x) for x in sums_4)
        return cls(
            loss / max(weight, 1.0),
            correct / max(weight, 1.0),
            loss / math.log(2) / size if size else math.nan,
            round(weight),
            round(size),
        )


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Quality on a split, and on each of its subsets that has tokens."""

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
    """Evaluates parameters of one model on a split.

    Args:
      config: The model.
      caches: A cache, or several of one vocabulary by name, evaluated as one; the subsets of
        several are named CACHE/SUBSET.
      split: "validation" or "test".
      batch_size: Rows at once, rounded up to a multiple of what the mesh divides a batch by.
      mesh: The mesh of the parameters.
      rules: Logical-axis rules.
      rows: The first rows of each cache's split to read; all by default.
      chunk_tokens: Tokens whose logits a device holds at once.

    Attributes:
      rows: Rows that an evaluation reads, of all caches.

    Raises:
      InputError: A cache has no such split.
    """

    def __init__(
        self,
        config: decoder.DecoderConfig,
        caches: PackedCache | Mapping[str, PackedCache],
        split: str,
        batch_size: int,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        rows: int | None = None,
        chunk_tokens: int = losses.LossConfig.chunk_tokens,
    ) -> None:
        self._caches = caches if isinstance(caches, Mapping) else {"": caches}
        self._split, self._rows, self._batch_size = split, rows, rounded_up(batch_size, mesh)
        self._mesh, self._rules = mesh, rules
        sizes = [len(cache.split(split)) for cache in self._caches.values()]
        self.rows = sum(min(rows or size, size) for size in sizes)
        self._subsets = max(len(cache.subsets) for cache in self._caches.values())
        byte_lengths_V = next(iter(self._caches.values())).vocabulary.byte_lengths

        def sums(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            ranks = ranks_of_batch(config, params, batch, mesh, rules, chunk_tokens)
            return _subset_sums(ranks, batch, jnp.asarray(byte_lengths_V), self._subsets)

        self._sums = jax.jit(sums, out_shardings=partitioning.replicated(mesh))

    def __call__(self, params: Any, rows: int | None = None) -> EvaluationResult:
        """Evaluates parameters, which are on the mesh, on `rows` rows of each cache.

        Raises:
          NotFiniteError: The model's losses on some rows are not finite.
        """
        whole_4, by_subset = np.zeros(4), {}
        for name, cache in self._caches.items():
            sums_4xS = self._sums_of(params, cache, rows or self._rows)
            whole_4 += sums_4xS.sum(axis=1)
            prefix = f"{name}/" if len(self._caches) > 1 else ""
            for i, subset in enumerate(cache.subsets):
                if sums_4xS[2, i] > 0:
                    by_subset[prefix + subset] = Quality.of(sums_4xS[:, i])
        return EvaluationResult(Quality.of(whole_4), by_subset)

    def _sums_of(self, params: Any, cache: PackedCache, rows: int | None) -> np.ndarray:
        """float64 [4, S] over one cache; each process reads its part of a batch."""
        part = partitioning.batch_part(self._mesh)
        split, start_id = cache.split(self._split), cache.start_id
        batches = input_pipeline.in_order(split, self._batch_size, start_id, rows, *part)
        total_4xS = np.zeros((4, self._subsets))
        for batch, sums_4xS in over_batches(self._sums, params, batches, self._mesh, self._rules):
            if not np.isfinite(sums_4xS).all():
                read = batch["row_id"][batch["row_id"] >= 0]
                raise NotFiniteError(
                    f"The model's losses are not finite among the rows {read.min()} to "
                    f"{read.max()} of {self._split} of {cache.path}: use another checkpoint."
                )
            total_4xS += sums_4xS
        return total_4xS


def _subset_sums(
    ranks: tuple[jax.Array, ...],
    batch: Mapping[str, jax.Array],
    byte_lengths_V: jax.Array,
    subsets: int,
) -> jax.Array:
    """float32 [4, S]: loss, correct predictions, weight and bytes by subset."""
    (loss_BxL, greater_BxL), weights_BxL = ranks, batch["loss_weights"]
    bytes_BxL = jnp.where(weights_BxL > 0, byte_lengths_V[batch["targets"]], 0)
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
