"""Examination on held-out rows: log-perplexity, bits per byte and accuracy on a cache's split."""

import dataclasses
import pathlib
import time
from typing import Any

from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import require_counts
from salt_jax.evaluation.examination import Examine, Examinee
from salt_jax.terminal import Table, print_table
from salt_jax.training.checkpoints import require_fit
from salt_jax.training.evaluation import EvaluationResult, Evaluator
from salt_jax.training.ledger import Cost


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The rows to evaluate on, an `Examination`.

    Attributes:
      cache: A packed cache with the model's vocabulary; none by default.
      split: Its split, "test" or "validation".
      rows: Only the first rows of the split; all by default.
    """

    cache: str | None = None
    split: str = "test"
    rows: int | None = None

    def __post_init__(self) -> None:
        require_counts(rows=self.rows)

    def prepare(self, examinee: Examinee) -> Examine:
        """See `Examination`; InputError for no such cache or split, or another vocabulary."""
        cache = PackedCache.open(self.cache or "")
        require_fit(examinee.saved, cache, "model")
        whole = len(cache.split(self.split))
        rows = min(self.rows or whole, whole)
        evaluator = Evaluator(
            examinee.saved.config,
            cache,
            self.split,
            examinee.batch_size,
            examinee.mesh,
            examinee.rules,
            rows,
            examinee.chunk_tokens,
        )

        def examine(_: pathlib.Path) -> dict[str, Any]:
            params = examinee.params
            start = time.perf_counter()
            result = evaluator(params)
            seconds = time.perf_counter() - start
            print_table(_table(result, f"{examinee.title} on {self.split}"))
            cost = Cost.of(examinee.saved.config, rows, cache.sequence_length, seconds)
            facts = {"split": self.split, "rows": rows}
            return facts | result.to_json() | dataclasses.asdict(cost)

        return examine


def _table(result: EvaluationResult, title: str) -> Table:
    return Table(
        title,
        ("", "log-perplexity", "bits per byte", "next-token accuracy", "tokens"),
        tuple(
            (
                name,
                f"{quality.log_perplexity:.4f}",
                f"{quality.bits_per_byte:.4f}",
                f"{quality.next_token_accuracy:.2%}",
                f"{quality.tokens:,}",
            )
            for name, quality in [("all", result.whole), *result.by_subset.items()]
        ),
    )
