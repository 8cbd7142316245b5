"""Scores of a generated text against a reference text, by name, 0 to 1 each.

number  exact_match: whether the numbers after "####" are equal (GSM8K); answered: whether
        the generated text has one
rouge   rouge1, rouge2, rougeL and rougeLsum: F-measures over stemmed words (XSum,
        CNN/DailyMail); rougeLsum treats each line as a sentence
label   accuracy: whether the texts are equal (ANLI), apart from case, white space at the ends
        and a last full stop
"""

import decimal
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from salt_jax.errors import InputError, needed_libraries

Scores = dict[str, float]

_NUMBER = re.compile(r"####\s*\$?\s*(-?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)")


def number_scores(generated: str, reference: str) -> Scores:
    """Scores of the first number after "####", compared by value (1,000 equals 1000.0); InputError
    if the reference has none."""
    expected = final_number(reference)
    if expected is None:
        shown = reference if len(reference) <= 80 else reference[:77] + "…"
        raise InputError(
            f"The metric 'number' compares numbers after \"####\", and the reference {shown!r} "
            "has none: correct the templates or the metric."
        )
    found = final_number(generated)
    return {"exact_match": float(found == expected), "answered": float(found is not None)}


def final_number(text: str) -> decimal.Decimal | None:
    """The first number after "####", with which GSM8K ends its answers; None if there is none."""
    match = _NUMBER.search(text)
    return decimal.Decimal(match[1] + match[2].replace(",", "")) if match else None


def rouge_scores(generated: str, reference: str) -> Scores:
    """ROUGE's F-measures (Lin, 2004), by the rouge_score package; InputError if it isn't
    installed."""
    return {
        name: float(score.fmeasure)
        for name, score in _rouge_scorer().score(reference, generated).items()
    }


def label_scores(generated: str, reference: str) -> Scores:
    """Whether the generated text is the label."""
    return {"accuracy": float(_label(generated) == _label(reference))}


METRICS: Mapping[str, Callable[[str, str], Scores]] = {
    "number": number_scores,
    "rouge": rouge_scores,
    "label": label_scores,
}


def _label(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


@functools.cache
def _rouge_scorer() -> Any:
    with needed_libraries("The metric 'rouge'", "eval"):
        from rouge_score import rouge_scorer
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
