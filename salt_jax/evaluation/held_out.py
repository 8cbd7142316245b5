"""Examination on held-out rows: log-perplexity, bits per byte and accuracy on a cache's split.

With --compare=RUN also the difference to another model on the same tokens (paired_comparison.py).
"""

import dataclasses
import pathlib
import time
from typing import Any

from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import InputError, require_counts
from salt_jax.evaluation import paired_comparison
from salt_jax.evaluation.examination import Examine, Examinee
from salt_jax.terminal import Table, print_table
from salt_jax.training.checkpoints import SavedModel, find_model, require_fit
from salt_jax.training.evaluation import EvaluationResult, Evaluator
from salt_jax.training.ledger import Cost


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The rows to evaluate on, an `Examination`.

    Attributes:
      cache: A packed cache with the model's vocabulary; none by default.
      split: Its split, "test" or "validation".
      rows: Only the first rows of the split; all by default.
      compare: The run folder of another model, to compare with on the same tokens.
      compare_step: Its checkpoint; the newest by default.
      slm: The run folder of a model by whose loss tokens are divided into deciles, from easy to
        hard, in a comparison.
      slm_step: Its checkpoint; the newest by default.
    """

    cache: str | None = None
    split: str = "test"
    rows: int | None = None
    compare: str | None = None
    compare_step: int | None = None
    slm: str | None = None
    slm_step: int | None = None

    def __post_init__(self) -> None:
        require_counts(rows=self.rows)
        if self.compare is None and self.slm is not None:
            raise InputError(
                "slm is set and compare is not: add --compare=RUN, the model to compare with."
            )

    def prepare(self, examinee: Examinee) -> Examine:
        """See `Examination`.

        Raises:
          InputError: No such cache, split or model to compare with, or another vocabulary.
        """
        cache = PackedCache.open(self.cache or "")
        require_fit(examinee.saved, cache, "model")
        others = self._others()
        for setting, other in others.items():
            require_fit(other, cache, f"model of --{setting}")
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
            facts |= result.to_json() | dataclasses.asdict(cost)
            if not others:
                return facts
            models = [examinee.saved, *others.values()]
            tokens = paired_comparison.losses_by_token(models, examinee, cache, self.split, rows)
            found = paired_comparison.differences(
                tokens, paired_comparison.token_groups(tokens, cache)
            )
            other = others["compare"]
            title = f"{examinee.title} compared with {other.path} at step {other.step}"
            print_table(paired_comparison.difference_table(found, title))
            identities = {setting: other.identity for setting, other in others.items()}
            comparison = {
                "title": title,
                **identities,
                **paired_comparison.differences_to_json(found),
            }
            return facts | {"comparison": comparison}

        return examine

    def _others(self) -> dict[str, SavedModel]:
        """The other models of a comparison by setting: compare first, then slm if it is set."""
        named = {
            "compare": (self.compare, self.compare_step),
            "slm": (self.slm, self.slm_step),
        }
        return {
            setting: find_model(model, step, setting)
            for setting, (model, step) in named.items()
            if model is not None
        }


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
