"""ROUGE of generated summaries, for tasks of lm-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from rouge_score import rouge_scorer

_KINDS = ("rouge1", "rouge2", "rougeL")
_SCORER = rouge_scorer.RougeScorer(_KINDS, use_stemmer=True)


def rouge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, 0 to 1."""
    true = doc["target"] if "target" in doc else doc["summary"]
    scores = _SCORER.score(true, results[0])
    return {kind: float(scores[kind].fmeasure) for kind in _KINDS}
