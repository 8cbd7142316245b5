"""RACE's articles, and the metrics of ReCoRD and SQuAD, for tasks of lm-eval."""

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

UNANSWERABLE = "unanswerable"


def race_articles(rows: datasets.Dataset) -> datasets.Dataset:
    """Groups rows of one question into rows of one article, in the form of EleutherAI/race."""
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


def record_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows with distinct entities and answers, in alphabetical order."""
    return rows.map(lambda row: {name: sorted({*row[name]}) for name in ("entities", "answers")})


def record_text(doc: Mapping[str, Any]) -> str:
    """The passage, its highlights as a list."""
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return passage + "\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_target(doc: Mapping[str, Any]) -> str:
    """The query with the first answer filled in."""
    return _record_choice(doc, doc["answers"][0])


def record_choices(doc: Mapping[str, Any]) -> list[str]:
    """The query with each entity filled in."""
    return [_record_choice(doc, entity) for entity in doc["entities"]]


def record_results(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """F1 and exact match of the most likely entity, the best over answers (arXiv 1810.12885)."""
    likelihoods = [likelihood for likelihood, _ in results]
    words = _words(doc["entities"][likelihoods.index(max(likelihoods))])
    answers = [_words(answer) for answer in doc["answers"]]
    return {
        "f1": max(_f1(words, answer) for answer in answers),
        "em": max(float(words == answer) for answer in answers),
    }


def _record_choice(doc: Mapping[str, Any], entity: str) -> str:
    return "  - " + doc["query"].replace("@placeholder", entity)


def _words(text: str) -> list[str]:
    """The text without case, punctuation and articles."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(given: list[str], true: list[str]) -> float:
    if not given or not true:
        return float(given == true)
    common = sum((collections.Counter(given) & collections.Counter(true)).values())
    return 2 * common / (len(given) + len(true))
