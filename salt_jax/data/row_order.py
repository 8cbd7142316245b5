"""Endless shuffled orders of rows: which row is read at a position.

An order is a pure function of the position, so resuming costs nothing. Each row of a source comes
exactly once per epoch, and every epoch is reshuffled. A mixture interleaves such orders without
skipping or repeating rows of any.
"""

import fractions
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from salt_jax.errors import InputError


class Draw(NamedTuple):
    """A row to read."""

    source: int  # the index of its cache
    row_id: int
    epoch: int  # how many epochs of the source came before


class Order(Protocol):
    """The order in which an input pipeline reads rows."""

    def __getitem__(self, position: int) -> Draw:
        """The row at a position, any integer from 0."""

    def rows_read(self, position: int) -> Mapping[int, int]:
        """How many rows of each source come before a position."""

    def sizes(self) -> Mapping[int, int]:
        """Rows per epoch of each source."""


class UnusedRows:
    """The ascending ids 0 … rows − 1 without `used_m` (int64[m], ascending, distinct), in O(m)
    memory."""

    def __init__(self, rows: int, used_m: np.ndarray) -> None:
        self._size = rows - len(used_m)
        # How many kept ids come before each used one: ascending, for binary search.
        self._kept_before_m = used_m - np.arange(len(used_m))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        """The index-th unused id."""
        return index + int(np.searchsorted(self._kept_before_m, index, side="right"))


class RowOrder:
    """Every row of a source once per epoch, in a new permutation each epoch: `row_ids`, or all of 0
    … rows − 1 if None."""

    def __init__(
        self, row_ids: np.ndarray | UnusedRows | None, rows: int, seed: int, source: int = 0
    ) -> None:
        self._row_ids = row_ids
        self._size = rows if row_ids is None else len(row_ids)
        self._source = source
        # Grain shuffles epoch e by seed + e: unhashed, seeds 0 and 1 would be one order, shifted.
        mixed = int(np.random.SeedSequence((seed, source)).generate_state(1)[0])
        self._order = grain.MapDataset.range(self._size).shuffle(seed=mixed).repeat()

    def __getitem__(self, position: int) -> Draw:
        index = self._order[position]
        row_id = int(index if self._row_ids is None else self._row_ids[index])
        return Draw(self._source, row_id, position // self._size)

    def rows_read(self, position: int) -> Mapping[int, int]:
        return {self._source: position}

    def sizes(self) -> Mapping[int, int]:
        return {self._source: self._size}


class MixedOrder:
    """Orders interleaved in fixed proportions.

    After k positions an order has given its weight's share of k rows, to within the number of
    orders. The rule is that of Grain's MapDataset.mix, but with exact weights, which Grain rounds.

    Args:
      orders: At least two, of different sources.
      weights: One positive weight per order; only their proportions matter.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        if len(weights) != len(orders) or not all(0 < w < math.inf for w in weights):
            raise InputError(
                f"weights is {tuple(weights)} and there are {len(orders)} caches: give each "
                "a number over 0."
            )
        exact = [fractions.Fraction(weight).limit_denominator(10**6) for weight in weights]
        smallest = math.lcm(*(weight.denominator for weight in exact))
        self._orders = tuple(orders)
        self._parts = [int(weight * smallest) for weight in exact]
        if not all(self._parts):
            raise InputError(
                f"weights is {tuple(weights)}: weights under a millionth count as 0; scale them up."
            )

    def __getitem__(self, position: int) -> Draw:
        before, after = self._counts(position), self._counts(position + 1)
        which = next(i for i, count in enumerate(before) if after[i] > count)
        return self._orders[which][before[which]]

    def rows_read(self, position: int) -> Mapping[int, int]:
        counts = zip(self._orders, self._counts(position), strict=True)
        return {k: n for order, count in counts for k, n in order.rows_read(count).items()}

    def sizes(self) -> Mapping[int, int]:
        return {source: size for order in self._orders for source, size in order.sizes().items()}

    def _counts(self, position: int) -> list[int]:
        """Rows from each order before a position.

        The first order gets its share, rounded up, the next its share of the rest, and so on, so
        each further position adds one row to exactly one order.
        """
        counts, left, parts_left = [], position, sum(self._parts)
        for part in self._parts:
            rest = left * (parts_left - part) // parts_left
            counts.append(left - rest)
            left, parts_left = rest, parts_left - part
        return counts
