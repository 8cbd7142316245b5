"""Near-duplicates by MinHash against the Jaccard index of the rows' own sets of tokens."""

import encodings
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill import near_duplicates
from salt_jax.distill.near_duplicates import HASHES, SHINGLE, find_near_duplicates, signatures


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of the sets that begin in the row, whose end is padded."""
    sets = []
    for row in (one, other):
        padded = [*row.tolist(), *[-1] * (SHINGLE - 1)]
        sets.append({tuple(padded[i : i + SHINGLE]) for i in range(len(row))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def padded_signatures(rows: list[np.ndarray]) -> np.ndarray:
    length = max(map(len, rows)) + SHINGLE
    targets = np.array([np.pad(row, (0, length - len(row)), constant_values=9) for row in rows])
    inside = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    return signatures(targets, inside.astype(np.int32))


def estimates(signatures_NxK: np.ndarray) -> np.ndarray:
    values = signatures_NxK.view(np.uint16)
    return (values[:, None] == values).mean(axis=-1)


@given(seed=st.integers(0, 2**32 - 1), vocab=st.sampled_from([30, 50_000]))
@settings(max_examples=40, deadline=None)
def test_equal_values_estimate_the_similarity(seed: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    row = rng.integers(vocab, size=300)
    rows = [row, row[:200], row[40:], row[rng.integers(300) :], rng.integers(vocab, size=100)]
    rows += [np.array([1, 2, vocab]), np.array([4, 5, vocab + 1])]
    errors = []
    found = estimates(padded_signatures(rows))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            exact = jaccard(one, other)
            errors.append((found[i, j] - exact) * np.sqrt(HASHES))
            assert abs(errors[-1]) <= 5.5 * np.sqrt(exact * (1 - exact)) + 0.5
    assert abs(np.mean(errors)) < 1.5


@given(
    seed=st.integers(0, 2**32 - 1),
    similarity=st.sampled_from([0.5, 0.8, 1.0]),
    shorter=st.sampled_from([1, 6]),
    scores=st.lists(
        st.sampled_from([0.5, 1.0, 2.0, 3.0, -1.0, -np.inf, np.nan]), min_size=2, max_size=30
    ),
)
@settings(max_examples=80, deadline=None)
def test_what_is_found_has_a_better_one_and_the_best_of_copies_stays(
    seed: int, similarity: float, shorter: int, scores: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    texts = rng.integers(1000, size=(4, 60))
    which = rng.integers(4, size=len(scores))
    rows = [texts[text][: 60 - 3 * rng.integers(shorter)] for text in which]
    scores_N = np.array(scores, np.float32)
    ranked = np.nan_to_num(scores_N, nan=-np.inf)
    signed = padded_signatures(rows)
    found = find_near_duplicates(scores_N, signed, similarity)
    alike = estimates(signed) >= similarity
    ids = np.arange(len(rows))
    better = (ranked[:, None] > ranked) | ((ranked[:, None] == ranked) & (ids[:, None] < ids))
    scored = np.isfinite(scores_N)
    # Between texts nothing is alike, so that of a text's rows the best one is no duplicate.
    assert not np.any(found & scored & ~(alike & better).any(axis=0))
    for text in range(4):
        own = np.flatnonzero((which == text) & scored)
        if len(own):
            assert not found[min(own, key=lambda i: (-ranked[i], i))]
            assert shorter > 1 or found[own].sum() == len(own) - 1


def test_copies_of_a_text_by_their_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 rows each has a worse copy, with up to 12 of its 150 tokens changed."""
    monkeypatch.setattr(near_duplicates, "_BLOCK_PAIRS", 7)
    rng = np.random.default_rng(1)
    rows = rng.integers(2048, size=(60, 150))
    copies = rows.copy()
    for i, copy in enumerate(copies):
        copy[rng.choice(150, i // 5, replace=False)] = 5000 + i
    scores = np.concatenate([np.arange(60), np.arange(60) - 0.5]).astype(np.float32)
    order = rng.permutation(120)
    both = np.concatenate([rows, copies])
    found = np.zeros(120, bool)
    found[order] = find_near_duplicates(
        scores[order], signatures(both[order], np.ones((120, 150), np.int32)), 0.75
    )
    exact = np.array([jaccard(one, other) for one, other in zip(rows, copies, strict=True)])
    assert not found[:60].any()
    assert found[60:][exact > 0.9].all()
    assert not found[60:][exact < 0.6].any()
    again = signatures(rows[[0, 0]], np.ones((2, 150), np.int32))
    assert find_near_duplicates(np.zeros(2), again, 1.0).tolist() == [False, True]
    assert (exact > 0.9).sum() > 9
    assert (exact < 0.6).sum() > 9


def test_modules_that_repeat_each_other() -> None:
    """Most of Python's codecs are copies of each other with another table."""
    paths = sorted(pathlib.Path(encodings.__file__).parent.glob("*.py"))
    rows = [np.frombuffer(path.read_bytes()[:400], np.uint8) for path in paths[:60]]
    exact = np.array([[jaccard(one, other) for other in rows] for one in rows])
    earlier = np.triu(exact, 1).max(axis=0)
    found = find_near_duplicates(np.zeros(len(rows), np.float32), padded_signatures(rows), 0.6)
    assert found[earlier > 0.75].all()
    assert not found[earlier < 0.4].any()
    assert (earlier > 0.75).sum() > 5
    assert (earlier < 0.4).sum() > 5
