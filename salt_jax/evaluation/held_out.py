"""The examination on held-out rows: a split of a packed cache in; log-perplexity, bits per byte and
next-token accuracy out, whole and by subset."""

import dataclasses
import pathlib
import time
from typing import Any

from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import require_counts
from salt_jax.evaluation.examination import Examinee
from salt_jax.terminal import Table, print_table
from salt_jax.training.evaluation import EvaluationResult, Evaluator
from salt_jax.training.ledger import Cost


class HeldOut:
    """Reads a split; an `Examination`.

    Args:
      examinee: The model.
      cache: The rows, of the model's vocabulary.
      split: "test" or "validation".
      rows: Rows to read, from the first on; all by default.

    Raises:
      InputError: No such split, or no rows.
    """

    def __init__(
        self, examinee: Examinee, cache: PackedCache, split: str = "test", rows: int | None = None
    ) -> None:
        require_counts(rows=rows)
        self._examinee, self._cache, self._split = examinee, cache, split
        whole = len(cache.split(split))
        self._rows = min(rows or whole, whole)
        self._evaluator = Evaluator(
            examinee.saved.config,
            cache,
            split,
            examinee.batch_size,
            examinee.mesh,
            examinee.rules,
            self._rows,
            examinee.chunk_tokens,
        )

    def __call__(self, params: Any, folder: pathlib.Path) -> dict[str, Any]:
        """See Examination; the figures, the rows and what reading them cost."""
        start = time.perf_counter()
        evaluation = self._evaluator(params)
        seconds = time.perf_counter() - start
        print_table(_table(evaluation, f"{self._examinee.title} on {self._split}"))
        length = self._cache.sequence_length
        cost = Cost.of(self._examinee.saved.config, self._rows, length, seconds)
        return {
            "split": self._split,
            "rows": self._rows,
            **evaluation.to_json(),
            **dataclasses.asdict(cost),
        }


def _table(evaluation: EvaluationResult, title: str) -> Table:
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
            for name, quality in [("all", evaluation.whole), *evaluation.by_subset.items()]
        ),
    )
