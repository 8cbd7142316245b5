"""Selection rules against a plain sort of everything."""

import collections
import fractions
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill import selection
from salt_jax.distill.selection import (
    Candidates,
    RandomRows,
    SelectionRule,
    Threshold,
    TopFraction,
    TopRows,
)
from salt_jax.errors import InputError

# Few distinct scores, so that ties are common, zeros of both signs, and the two never chosen.
SCORES = st.lists(
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 0.0, -0.0, -1.5, -np.inf, np.nan]), min_size=1, max_size=40
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several blocks."""
    monkeypatch.setattr(selection, "_BLOCK_ROWS", 7)


def best_first(scores: np.ndarray) -> list[int]:
    scored = [i for i in range(len(scores)) if scores[i] > -np.inf]
    return sorted(scored, key=lambda i: (-scores[i], i))


def chosen(rule: SelectionRule, scores: np.ndarray, subsets: np.ndarray | None = None) -> list[int]:
    number = 0 if subsets is None else int(subsets.max()) + 2  # one subset without rows
    scores = np.asarray(scores, np.float32)
    choice = rule.select(Candidates(len(scores), scores, subsets, number))
    blocks = list(choice.blocks())
    assert all(block.dtype == np.int64 for block in blocks)
    ids = np.concatenate(blocks).tolist()
    assert ids == sorted({*ids})
    assert len(ids) == choice.rows
    if not isinstance(rule, RandomRows):
        assert choice.cut == min(scores[ids])
    return ids


@given(scores=SCORES, m=st.integers(1, 45))
def test_top_rows(scores: list[float], m: int) -> None:
    scores_N = np.array(scores, np.float32)
    order = best_first(scores_N)
    if m <= len(order):
        assert chosen(TopRows(m), scores_N) == sorted(order[:m])
    else:
        with pytest.raises(InputError, match=f"m is {m}, but only {len(order)} of {len(scores)}"):
            chosen(TopRows(m), scores_N)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.001, 1.0))
@settings(max_examples=30)
def test_any_floats_are_told_apart_to_the_last_bit(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    any_bits = rng.integers(2**32, size=300, dtype=np.uint32).view(np.float32)
    close = np.float32(2.5).view(np.uint32) + rng.integers(9, size=300, dtype=np.uint32)
    for scores_N in (any_bits, close.view(np.float32), -close.view(np.float32)):
        order = best_first(scores_N)
        m = max(1, int(share * len(order)))
        assert chosen(TopRows(m), scores_N) == sorted(order[:m])


@given(scores=SCORES, percent=st.integers(1, 100))
def test_top_fraction(scores: list[float], percent: int) -> None:
    scores_N = np.array(scores, np.float32)
    order = best_first(scores_N)
    if order:
        rows = max(1, percent * len(scores) // 100)
        assert chosen(TopFraction(percent / 100), scores_N) == sorted(order[:rows])
    else:
        with pytest.raises(InputError, match="No row has a score"):
            chosen(TopFraction(percent / 100), scores_N)


@given(scores=SCORES, threshold=st.sampled_from([-5.0, 0.0, 0.5, 0.75, 2.0, 3.0, 4.0]))
def test_threshold(scores: list[float], threshold: float) -> None:
    scores_N = np.array(scores, np.float32)
    want = [i for i in best_first(scores_N) if scores_N[i] >= threshold]
    if want:
        assert chosen(Threshold(threshold), scores_N) == sorted(want)
    else:
        with pytest.raises(InputError, match="above every score"):
            chosen(Threshold(threshold), scores_N)


def test_a_threshold_below_all_numbers_takes_the_rows_with_a_score() -> None:
    scores_N = np.array([1.0, -np.inf, -2.0, np.nan], np.float32)
    assert chosen(Threshold(-1e300), scores_N) == [0, 2]
    with pytest.raises(InputError, match=r"above every score \(the highest is 1.0\)"):
        chosen(Threshold(1e300), scores_N)


@given(
    scores=SCORES.filter(lambda scores: len(best_first(np.array(scores, np.float32))) > 0),
    seed=st.integers(0, 2**32 - 1),
    fraction=st.floats(0.01, 1.0),
)
def test_strata_have_their_shares_of_the_same_number_of_rows(
    scores: list[float], seed: int, fraction: float
) -> None:
    scores_N = np.array(scores, np.float32)
    subsets_N = np.random.default_rng(seed).integers(3, size=len(scores)).astype(np.uint16)
    plain = chosen(TopFraction(fraction), scores_N)
    stratified = chosen(TopFraction(fraction, stratified=True), scores_N, subsets_N)
    assert len(stratified) == len(plain)
    quotas = largest_remainder(len(plain), subsets_N, scores_N)
    order = best_first(scores_N)
    want: list[int] = []
    for subset, quota in quotas.items():
        want += [i for i in order if subsets_N[i] == subset][:quota]
    assert stratified == sorted(want)
    m = len(plain)
    assert chosen(TopRows(m, stratified=True), scores_N, subsets_N) == stratified
    threshold = sorted(scores_N[order])[len(order) // 2]
    plain = chosen(Threshold(float(threshold)), scores_N)
    same = chosen(TopRows(len(plain), stratified=True), scores_N, subsets_N)
    assert chosen(Threshold(float(threshold), stratified=True), scores_N, subsets_N) == same


@given(
    scores=SCORES.filter(lambda scores: len(best_first(np.array(scores, np.float32))) > 0),
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 20),
    share=st.sampled_from([0.2, 0.34, 0.5, 0.75, 0.99]),
)
def test_no_subset_has_more_than_its_share(
    scores: list[float], seed: int, m: int, share: float
) -> None:
    scores_N = np.array(scores, np.float32)
    subsets_N = np.random.default_rng(seed).integers(3, size=len(scores)).astype(np.uint16)
    order = sorted(best_first(scores_N), key=lambda i: (-scores_N[i], subsets_N[i], i))
    taken: collections.Counter[int] = collections.Counter()
    want = []
    for i in order:
        if len(want) < m and taken[subsets_N[i]] < int(share * m):
            taken[subsets_N[i]] += 1
            want.append(i)
    rule = TopRows(m, most_of_subset=share)
    if len(want) == m:
        assert chosen(rule, scores_N, subsets_N) == sorted(want)
        if m == int(m / len(scores) * len(scores)):
            fraction = TopFraction(m / len(scores), most_of_subset=share)
            assert chosen(fraction, scores_N, subsets_N) == sorted(want)
        room = TopRows(m, most_of_subset=1.0)
        assert chosen(room, scores_N, subsets_N) == sorted(order[:m])
    elif m <= len(order):
        with pytest.raises(InputError, match=f"most_of_subset is {share}"):
            chosen(rule, scores_N, subsets_N)


@given(
    scores=SCORES.filter(lambda scores: len(best_first(np.array(scores, np.float32))) > 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_strata_under_a_bound_are_apportioned_among_those_with_room(
    scores: list[float], seed: int
) -> None:
    scores_N = np.array(scores, np.float32)
    subsets_N = np.random.default_rng(seed).integers(3, size=len(scores)).astype(np.uint16)
    rule = TopRows(2, stratified=True, most_of_subset=0.5)
    if len({*subsets_N[best_first(scores_N)]}) > 1:
        assert len({*subsets_N[chosen(rule, scores_N, subsets_N)]}) == 2


def largest_remainder(m: int, subsets_N: np.ndarray, scores_N: np.ndarray) -> dict[int, int]:
    """Shares of m by the subsets' rows, in fractions; what one can't give the others do."""
    weights = collections.Counter(subsets_N.tolist())
    most = collections.Counter(subsets_N[scores_N > -np.inf].tolist())
    fixed: dict[int, int] = {name: 0 for name in weights if not most[name]}
    while True:
        free = sorted(name for name in weights if name not in fixed)
        left = m - sum(fixed.values())
        total = max(sum(weights[name] for name in free), 1)
        exact = {name: fractions.Fraction(left * weights[name], total) for name in free}
        quotas = {name: int(share) for name, share in exact.items()}
        rest = sorted(free, key=lambda name: (quotas[name] - exact[name], name))
        for name in rest[: left - sum(quotas.values())]:
            quotas[name] += 1
        over = [name for name in free if quotas[name] > most[name]]
        if not over:
            return {**fixed, **quotas}
        fixed.update({name: most[name] for name in over})


def test_shares_of_counts_that_do_not_fit_64_bits() -> None:
    weights = np.array([3, 4, 5]) * 10**11
    shares = selection.apportion(10**12, weights, weights)
    assert shares.tolist() == [250 * 10**9, 10**12 // 3, 10**12 // 12 * 5 + 2]
    assert shares.sum() == 10**12


def test_random_rows_are_distinct_repeatable_and_blind_to_scores() -> None:
    scores_N = np.where(np.arange(1000) % 2, -np.inf, 1.0).astype(np.float32)
    ids = chosen(RandomRows(300, seed=5), scores_N)
    assert 100 < sum(i % 2 for i in ids) < 200
    assert ids == chosen(RandomRows(300, seed=5), np.zeros(1000))
    assert ids != chosen(RandomRows(300, seed=6), scores_N)
    assert chosen(RandomRows(1000), scores_N) == list(range(1000))
    with pytest.raises(InputError, match="m is 1001, but there are only 1000 rows"):
        chosen(RandomRows(1001), scores_N)


def test_random_rows_need_neither_scores_nor_one_way_of_cutting_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = 200_000  # several lots
    ids = []
    for block_rows in (1 << 20, 70_001, 65_536):
        monkeypatch.setattr(selection, "_BLOCK_ROWS", block_rows)
        choice = RandomRows(1000, seed=3).select(Candidates(rows))
        assert choice.cut is None
        ids.append(np.concatenate(list(choice.blocks())).tolist())
    assert ids[0] == ids[1] == ids[2]
    thirds = np.bincount(np.array(ids[0]) * 3 // rows)
    assert thirds.min() > 250


def test_every_row_is_as_likely_by_lot() -> None:
    counts = np.zeros(20)
    for seed in range(600):
        counts[chosen(RandomRows(5, seed=seed), np.zeros(20))] += 1
    assert counts.sum() == 3000
    assert abs(counts - 150).max() < 5 * np.sqrt(150 * 0.75)


def test_stratified_random_rows() -> None:
    subsets_N = (np.arange(1000) % 10 == 0).astype(np.uint16)
    ids = chosen(RandomRows(100, stratified=True), np.zeros(1000), subsets_N)
    assert np.bincount(subsets_N[ids]).tolist() == [90, 10]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (TopRows, {"m": 0}, "TopRows.m is 0"),
        (TopRows, {"m": 1.5}, "TopRows.m is 1.5"),
        (TopFraction, {"fraction": 0.0}, "fraction is 0.0"),
        (TopFraction, {"fraction": 1.01}, "fraction is 1.01"),
        (TopRows, {"m": 1, "most_of_subset": 0.0}, "TopRows.most_of_subset is 0.0"),
        (TopFraction, {"fraction": 1.0, "most_of_subset": 2.0}, "most_of_subset is 2.0"),
        (Threshold, {"threshold": float("nan")}, "threshold is nan"),
        (RandomRows, {"m": -1}, "RandomRows.m is -1"),
        (RandomRows, {"m": 1, "seed": -1}, "RandomRows.seed is -1"),
        (RandomRows, {"m": 1, "like": "x"}, "set one of them"),
        (RandomRows, {}, "RandomRows.m is None and RandomRows.like ''"),
    ],
)
def test_bad_settings_are_named(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kind(**settings)
