"""Orders of rows: once an epoch each, in fixed proportions, from any position."""

import collections

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.data.row_order import MixedOrder, RowOrder, UnusedRows
from salt_jax.errors import InputError


def test_every_row_once_an_epoch_and_epochs_differ() -> None:
    order = RowOrder(None, 48, seed=0, source=3)
    epochs = [[order[e * 48 + i].row_id for i in range(48)] for e in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [RowOrder(None, 48, seed=1)[i].row_id for i in range(48)] != epochs[0]
    assert epochs[0] != list(range(48))
    assert order[47] == (3, epochs[0][-1], 0)
    assert order[48] == (3, epochs[1][0], 1)


@settings(deadline=None)
@given(st.sets(st.integers(0, 30)), st.integers(0, 5))
def test_unused_rows_are_the_others_in_order(used: set[int], more: int) -> None:
    rows = max(used, default=0) + 1 + more
    unused = UnusedRows(rows, np.array(sorted(used), np.int64))
    assert [unused[i] for i in range(len(unused))] == sorted(set(range(rows)) - used)


@settings(deadline=None, max_examples=15)  # Grain's shuffle of a few rows takes long
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=2, max_size=4),
    st.integers(0, 80),
)
def test_a_mixture_reads_each_of_its_orders_in_order(
    sources: list[tuple[int, int]], rows: int
) -> None:
    """To within the number of orders each gets its share; in each of them nothing is skipped."""
    weights = [weight for weight, _ in sources]
    orders = [RowOrder(None, size, seed=1, source=i) for i, (_, size) in enumerate(sources)]
    mixed = MixedOrder(orders, [weight / 7 for weight in weights])
    draws = [mixed[position] for position in range(rows)]
    for source, order in enumerate(orders):
        mine = [draw for draw in draws if draw.source == source]
        assert mine == [order[position] for position in range(len(mine))]
        assert len(mine) == mixed.rows_read(rows)[source]
        assert abs(len(mine) - rows * weights[source] / sum(weights)) < len(orders)
    assert mixed.sizes() == {i: size for i, (_, size) in enumerate(sources)}


def test_the_rule_is_grains() -> None:
    parts = [grain.MapDataset.range(10**6).map(lambda i, s=s: (s, i)) for s in range(3)]
    expected = grain.MapDataset.mix(parts, [1, 3, 2])
    mixed = MixedOrder([RowOrder(None, 10**6, 0, source) for source in range(3)], [1, 3, 2])
    seen: collections.Counter[int] = collections.Counter()
    for position in range(200):
        source, index = expected[position]
        assert (mixed[position].source, seen[source]) == (source, index)
        seen[source] += 1


def test_a_far_position_is_as_near_as_the_first() -> None:
    mixed = MixedOrder([RowOrder(None, 7, 0, 0), RowOrder(None, 11, 0, 1)], [0.7, 0.3])
    assert mixed.rows_read(10**15) == {0: 7 * 10**14, 1: 3 * 10**14}
    assert mixed[10**15].epoch in (10**14, 3 * 10**14 // 11)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_weights_that_are_none_are_refused(weights: tuple[float, ...]) -> None:
    orders = [RowOrder(None, 5, 0, source) for source in range(2)]
    with pytest.raises(InputError, match="weights is"):
        MixedOrder(orders, weights)
    with pytest.raises(InputError, match="under a millionth"):
        MixedOrder(orders, (1.0, 1e-9))


def test_another_seed_is_another_order_in_every_epoch() -> None:
    """Not the same one, an epoch later."""
    orders = [[RowOrder(None, 50, seed)[at].row_id for at in range(200)] for seed in range(4)]
    epochs = [tuple(order[first : first + 50]) for order in orders for first in range(0, 200, 50)]
    assert len(set(epochs)) == len(epochs)
    other = [RowOrder(None, 50, 0, source=1)[at].row_id for at in range(50)]
    assert tuple(other) not in epochs
