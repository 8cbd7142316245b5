"""Selection rules against a plain sort of everything."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_jax.distill.selection import RandomRows, SelectionRule, Threshold, TopFraction, TopRows
from salt_jax.errors import InputError

# Few distinct scores, so that ties are common, and the two that are never chosen.
SCORES = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, -np.inf, np.nan]), min_size=1, max_size=40)


def best_first(scores: np.ndarray) -> list[int]:
    scored = [i for i in range(len(scores)) if scores[i] > -np.inf]
    return sorted(scored, key=lambda i: (-scores[i], i))


def check(rule: SelectionRule, scores: np.ndarray, want: list[int]) -> None:
    got = rule.select(scores)
    assert got.dtype == np.int64
    assert got.tolist() == sorted(want)


@given(scores=SCORES, m=st.integers(1, 45))
def test_top_rows(scores: list[float], m: int) -> None:
    scores_N = np.array(scores, np.float32)
    order = best_first(scores_N)
    if m <= len(order):
        check(TopRows(m), scores_N, order[:m])
    else:
        with pytest.raises(InputError, match=f"m is {m}, but only {len(order)} of {len(scores)}"):
            TopRows(m).select(scores_N)


@given(scores=SCORES, percent=st.integers(1, 100))
def test_top_fraction(scores: list[float], percent: int) -> None:
    scores_N = np.array(scores, np.float32)
    order = best_first(scores_N)
    if order:
        rows = max(1, percent * len(scores) // 100)
        check(TopFraction(percent / 100), scores_N, order[:rows])
    else:
        with pytest.raises(InputError, match="No row has a score"):
            TopFraction(percent / 100).select(scores_N)


@given(scores=SCORES, threshold=st.sampled_from([-5.0, 0.5, 0.75, 2.0, 3.0, 4.0]))
def test_threshold(scores: list[float], threshold: float) -> None:
    scores_N = np.array(scores, np.float32)
    want = [i for i in best_first(scores_N) if scores_N[i] >= threshold]
    if want:
        check(Threshold(threshold), scores_N, want)
    else:
        with pytest.raises(InputError, match="above every score"):
            Threshold(threshold).select(scores_N)


def test_random_rows_are_distinct_repeatable_and_blind_to_scores() -> None:
    scores_N = np.where(np.arange(1000) % 2, -np.inf, 1.0).astype(np.float32)
    chosen = RandomRows(300, seed=5).select(scores_N)
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == 300
    assert (np.diff(chosen) > 0).all()
    assert 100 < (chosen % 2).sum() < 200
    np.testing.assert_array_equal(chosen, RandomRows(300, seed=5).select(np.zeros(1000)))
    assert (chosen != RandomRows(300, seed=6).select(scores_N)).any()
    np.testing.assert_array_equal(RandomRows(1000).select(scores_N), np.arange(1000))
    with pytest.raises(InputError, match="m is 1001, but there are only 1000 rows"):
        RandomRows(1001).select(scores_N)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (TopRows, {"m": 0}, "TopRows.m is 0"),
        (TopRows, {"m": 1.5}, "TopRows.m is 1.5"),
        (TopFraction, {"fraction": 0.0}, "fraction is 0.0"),
        (TopFraction, {"fraction": 1.01}, "fraction is 1.01"),
        (Threshold, {"threshold": float("nan")}, "threshold is nan"),
        (RandomRows, {"m": -1}, "RandomRows.m is -1"),
        (RandomRows, {"m": 1, "seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_named(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kind(**settings)
