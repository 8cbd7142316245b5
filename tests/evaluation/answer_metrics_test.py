"""Metrics of generated texts, against cases worked out by hand."""

import decimal
import sys

import pytest

from salt_jax.errors import InputError
from salt_jax.evaluation import answer_metrics
from salt_jax.evaluation.answer_metrics import (
    final_number,
    label_scores,
    number_scores,
    rouge_scores,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### 1,234.", "1234"),
        ("#### -12", "-12"),
        ("####-0.50", "-0.5"),
        ("#### $1,000", "1000"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### .5 of it", "0.5"),
        ("#### 7\nQuestion: 8?\nAnswer: #### 9", "7"),
    ],
)
def test_the_number_behind_the_marks(text, number):
    assert final_number(text) == decimal.Decimal(number)


@pytest.mark.parametrize("text", ["", "7", "it is 7", "### 7", "#### seven", "####", "#### -"])
def test_no_number_behind_the_marks(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("generated", "equal", "answered"),
    [
        ("#### 1200", 1, 1),
        ("thus\n#### 1,200.00", 1, 1),
        ("#### 120", 0, 1),
        ("#### -1200", 0, 1),
        ("the answer is 1,200", 0, 0),
        ("", 0, 0),
    ],
)
def test_exact_match_of_numbers(generated, equal, answered):
    scores = number_scores(generated, "He has 3 * 400.\n#### 1,200")
    assert scores == {"exact_match": equal, "answered": answered}


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(InputError, match=r"the reference 'so it is 7' has none"):
        number_scores("#### 7", "so it is 7")


def test_rouge_by_hand():
    scores = rouge_scores(" the cats sat\non a mat", "the cat sat\non the mat")
    # Stems: the cat sat on a mat, the cat sat on the mat. 5 of 6 words; 3 of 5 pairs; the longest
    # common subsequence is the cat sat on mat.
    assert scores == pytest.approx(
        {"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6, "rougeLsum": 5 / 6}
    )
    # With the lines the other way round a sentence is found wherever it stands, by rougeLsum alone.
    turned = rouge_scores("on the mat\nthe cat sat", "the cat sat\non the mat")
    assert turned["rougeLsum"] == pytest.approx(1)
    assert turned["rougeL"] == pytest.approx(3 / 6)
    assert set(rouge_scores("", "the cat").values()) == {0}


def test_rouge_without_its_library(monkeypatch):
    answer_metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(InputError, match=r"needs the library rouge_score.*salt_jax\[eval\]"):
        rouge_scores("a", "b")


@pytest.mark.parametrize(
    ("generated", "correct"),
    [(" True", 1), ("true.", 1), (" True \n", 1), (" False", 0), ("", 0), (" True or False", 0)],
)
def test_labels(generated, correct):
    assert label_scores(generated, " True") == {"accuracy": correct}
