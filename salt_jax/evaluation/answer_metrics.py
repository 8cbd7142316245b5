"""Generated texts against reference texts, each metric a pure function.

In: two texts. Out: scores by name, each 0 to 1, whose means over a data set are its metrics.

    number  exact_match: whether the numbers behind "####" are equal (GSM8K); answered: whether
            the generated text has one
    rouge   rouge1, rouge2, rougeL and rougeLsum: F-measures over stemmed words (XSum,
            CNN/DailyMail); rougeLsum takes each line for a sentence
    label   accuracy: whether the texts are equal (ANLI), case, white space at the ends and a last
            full stop aside
"""

import decimal
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from salt_jax.errors import InputError

Scores = dict[str, float]

_NUMBER = re.compile(r"####\s*\$?\s*(-?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)")


def number_scores(generated: str, reference: str) -> Scores:
    """Of the first number behind "####"; one without commas, equal in value, is equal.

    Raises:
      InputError: The reference has no such number.
    """
    expected = final_number(reference)
    if expected is None:
        raise InputError(
            f"The metric 'number' compares numbers behind \"####\", and the reference "
            f"{_shortened(reference)} has none: correct the templates or the metric."
        )
    found = final_number(generated)
    return {"exact_match": float(found == expected), "answered": float(found is not None)}


def final_number(text: str) -> decimal.Decimal | None:
    """The first number behind "####", as GSM8K ends its answers; None where there is none."""
    match = _NUMBER.search(text)
    return decimal.Decimal(match[1] + match[2].replace(",", "")) if match else None


def rouge_scores(generated: str, reference: str) -> Scores:
    """ROUGE's F-measures (Lin, 2004), by the rouge_score package.

    Raises:
      InputError: The package isn't installed.
    """
    return {
        name: score.fmeasure for name, score in _rouge_scorer().score(reference, generated).items()
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


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise InputError(
            f"The metric 'rouge' needs the library {error.name}, which is not installed: "
            "pip install 'salt_jax[eval]'."
        ) from error
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
