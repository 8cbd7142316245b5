"""Rows and batches: shifting, positions, types."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from salt_jax.data.features import ROW_DTYPES, make_batch, make_row, segment_positions, shift_right


def test_the_docstring_example():
    row = make_row(
        np.array([7, 8, 1, 9, 1, 0]),
        np.array([1, 1, 1, 1, 1, 0]),
        np.array([1, 1, 1, 2, 2, 0]),
        subset=0,
        row_id=41,
    )
    batch = make_batch([row, row], start_id=2)
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0]
    assert batch["inputs"].tolist() == [[2, 7, 8, 2, 9, 2]] * 2
    assert batch["row_id"].tolist() == [41, 41]
    assert {name: batch[name].dtype.type for name in ROW_DTYPES} == dict(ROW_DTYPES)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_inputs_never_see_their_target_or_another_segment(lengths, padding):
    segment_ids_L = np.concatenate(
        [np.repeat(np.arange(1, len(lengths) + 1), lengths), np.zeros(padding, int)]
    )
    targets_L = np.arange(100, 100 + len(segment_ids_L))  # every target is unique
    inputs_L = shift_right(targets_L, segment_ids_L, start_id=1)
    positions_L = segment_positions(segment_ids_L)
    for place, segment in enumerate(segment_ids_L):
        begins = place == 0 or segment_ids_L[place - 1] != segment
        assert inputs_L[place] == (1 if begins else targets_L[place - 1])
        assert positions_L[place] == (0 if begins else positions_L[place - 1] + 1)


def test_shifting_leaves_its_arguments_alone():
    targets_BxL = np.array([[5, 6, 7]])
    shift_right(targets_BxL, np.ones((1, 3)), 2)
    assert targets_BxL.tolist() == [[5, 6, 7]]
