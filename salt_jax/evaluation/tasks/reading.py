"""Reading comprehension: rows and answers in; RACE's articles and SQuAD's metrics out."""

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

UNANSWERABLE = "unanswerable"


def race_articles(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of a question each as rows of an article each, in the form of EleutherAI/race."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problem = {name: row[name] for name in ("question", "answer", "options")}
        problems.setdefault(row["article"], []).append(problem)
    articles = [{"article": text, "problems": str(asked)} for text, asked in problems.items()]
    return datasets.Dataset.from_list(articles)


def squad_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """SQuAD 2.0's exact match and F1 (arXiv 1806.03822), by its official script's rules.

    "unanswerable" is the answer that there is none.
    """
    answers = [text for text in doc["answers"]["text"] if _words(text)] or [""]
    words = _words(results[0])
    given = [] if words == [UNANSWERABLE] else words
    return {
        "exact": max(float(given == _words(answer)) for answer in answers),
        "f1": max(_f1(given, _words(answer)) for answer in answers),
    }


def _words(text: str) -> list[str]:
    """Without case, punctuation and articles."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(given: list[str], true: list[str]) -> float:
    if not given or not true:
        return float(given == true)
    common = sum((collections.Counter(given) & collections.Counter(true)).values())
    return 2 * common / (len(given) + len(true))
