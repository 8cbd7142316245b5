"""Packing: no token lost or doubled, weights and segments as documented, order by seed alone."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.preparation.packing import PACKINGS, Packing, pack, shuffled_order

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)
EOS, PAD = 1, 0
CONCATENATE = "concatenate_and_split"


def _documents(lengths):
    """Documents of unique tokens, so that each can be found again."""
    starts = np.cumsum([100, *lengths])
    return [
        np.append(np.arange(start, start + length - 1), EOS)
        for start, length in zip(starts, lengths, strict=False)
    ]


def _pack(
    documents, subsets=None, packing="concatenate_and_split", length=8, seed=0, split="train"
):
    none = np.zeros(len(documents), int)
    subsets = none if subsets is None else np.array(subsets)
    settings = Packing(sequence_length=length, packing=packing, seed=seed)
    return pack(documents, subsets, none, settings, pad_id=PAD, split=split)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12), seed=st.integers(0, 9))
def test_every_token_is_in_exactly_one_row(packing, lengths, length, seed):
    documents = _documents(lengths)
    rows = list(_pack(documents, packing=packing, length=length, seed=seed))
    tokens = np.concatenate([row["targets"][row["segment_ids"] > 0] for row in rows])
    assert sorted(tokens) == sorted(np.concatenate(documents))
    for row in rows:
        padding_L = row["segment_ids"] == 0
        assert np.all(row["targets"][padding_L] == PAD)
        assert np.all(row["loss_weights"][padding_L] == 0)
        assert np.all(np.diff(padding_L.astype(int)) >= 0)
        # Inside a piece only the first token may be without weight.
        assert np.all(
            row["loss_weights"][row["positions"] > 0] == 1 - padding_L[row["positions"] > 0]
        )


@settings(deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12))
def test_concatenated_rows_are_full_and_start_without_weight(lengths, length):
    rows = list(_pack(_documents(lengths), length=length))
    assert len(rows) == -(-sum(lengths) // length)
    assert sum(int((row["segment_ids"] == 0).any()) for row in rows) <= 1
    for row in rows:
        assert row["loss_weights"][0] == 0
        assert row["segment_ids"].max() == 1


def test_concatenated_rows_follow_the_stream():
    documents = _documents([5, 5, 5])
    rows = list(_pack(documents, length=4, seed=3))
    stream = np.concatenate([documents[i] for i in shuffled_order(3, 3, "documents of train")])
    expected = [[*stream[i : i + 4], *[PAD] * 4][:4] for i in range(0, 15, 4)]
    assert sorted(row["targets"].tolist() for row in rows) == sorted(map(list, expected))


@settings(deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12))
def test_whole_documents_stay_whole(lengths, length):
    documents = _documents(lengths)
    rows = list(_pack(documents, packing="whole_documents", length=length))
    segments = [
        (row["targets"][row["segment_ids"] == s], row["loss_weights"][row["segment_ids"] == s])
        for row in rows
        for s in range(1, row["segment_ids"].max() + 1)
    ]
    pieces = [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    begins = [i == 0 for d in documents for i in range(0, len(d), length)]
    assert sorted(s.tolist() for s, _ in segments) == sorted(p.tolist() for p in pieces)
    first_weight = {tuple(targets): weights[0] for targets, weights in segments}
    for piece, begin in zip(pieces, begins, strict=True):
        if list(piece) != [EOS]:  # not unique
            assert first_weight[tuple(piece)] == begin


def test_best_fit_leaves_no_avoidable_padding():
    rows = list(_pack(_documents([6, 5, 3, 2, 8]), packing="whole_documents", length=8))
    assert len(rows) == 3
    assert sum((row["segment_ids"] == 0).sum() for row in rows) == 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_rows_subset_is_that_of_most_of_its_tokens(packing):
    lengths = np.random.default_rng(0).integers(1, 20, 200)
    documents = _documents(lengths)
    subsets = np.random.default_rng(1).integers(0, 3, 200)
    subset_of_token = {
        token: subset
        for document, subset in zip(documents, subsets, strict=True)
        for token in document[:-1]
    }
    for row in _pack(documents, subsets, packing=packing, length=16):
        known = [subset_of_token.get(token) for token in row["targets"].tolist()]
        counts = [known.count(subset) for subset in range(3)]
        ends = int((row["targets"] == EOS).sum())  # whose documents the test doesn't know
        assert counts[int(row["subset"])] + ends >= max(counts)


def test_the_majority_wins_and_of_equals_the_first():
    documents = [np.arange(10, 13), np.arange(20, 25)]
    (row,) = _pack(documents, [1, 0], length=8)
    assert row["subset"] == 0
    (row,) = _pack([documents[0], documents[0]], [2, 1], length=8)
    assert row["subset"] == 1


def test_many_subsets_take_no_more_memory_than_few():
    documents = _documents([7] * 40_000)
    tracemalloc.start()
    rows = _pack(documents, np.arange(40_000), length=16)
    first = next(rows)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100e6  # a table of documents by subsets would take 12.8 GB
    assert len({int(row["subset"]) for row in [first, *rows]}) > 10_000


def test_order_depends_on_seed_and_split_alone():
    documents = _documents([7] * 30)

    def targets(**changes):
        return [row["targets"].tolist() for row in _pack(documents, **changes)]

    assert targets() == targets()
    assert targets() != targets(seed=1)
    assert targets() != targets(split="test")
    assert [int(row["row_id"]) for row in _pack(documents)] == list(range(len(targets())))


def test_shuffled_order_is_a_fixed_permutation():
    order = shuffled_order(1000, 0, "rows of train")
    assert sorted(order) == list(range(1000))
    # Written down once: another release of any library must not renumber rows.
    assert order[:8].tolist() == [861, 606, 944, 299, 531, 76, 629, 585]
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
