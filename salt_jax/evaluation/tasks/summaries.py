"""ROUGE of generated summaries, for tasks of lm-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.evaluation.answer_metrics import rouge_scores


def rouge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, 0 to 1."""
    scores = rouge_scores(results[0], doc["target"] if "target" in doc else doc["summary"])
    return {kind: scores[kind] for kind in ("rouge1", "rouge2", "rougeL")}
