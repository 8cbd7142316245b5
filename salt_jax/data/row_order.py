"""Endless orders of rows: which row is read at a position.

An order is a function of the position alone, computed element by element, so that resuming costs
nothing. Each row of a source comes exactly once in each of its epochs, and every epoch is shuffled
anew. A mixture interleaves such orders: none of them skips a row or reads one twice.
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
    epoch: int  # how often the order has been through all of the source's rows before


class Order(Protocol):
    """The order that an input pipeline reads rows in."""

    def __getitem__(self, position: int) -> Draw:
        """The row at a position, from 0 on without end."""

    def rows_read(self, position: int) -> Mapping[int, int]:
        """How many of the positions before this one are of each source."""

    def sizes(self) -> Mapping[int, int]:
        """Rows of an epoch of each source."""


class UnusedRows:
    """The ids 0 … rows − 1 without some, ascending, in the memory of those left out.

    Args:
      rows: All rows.
      used_m: int64[m], the ids left out, ascending, each once.
    """

    def __init__(self, rows: int, used_m: np.ndarray) -> None:
        self._size = rows - len(used_m)
        # How many kept ids come before each one left out: ascending, so it can be searched.
        self._kept_before_m = used_m - np.arange(len(used_m))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        """The index-th of the ids kept."""
        return index + int(np.searchsorted(self._kept_before_m, index, side="right"))


class RowOrder:
    """Every row of a source once an epoch, each epoch a permutation of its own.

    Args:
      row_ids: The rows to draw from; None is all of 0 … rows − 1.
      rows: How many there are when row_ids is None.
      seed: Of the permutations.
      source: Its number in draws.
    """

    def __init__(
        self, row_ids: np.ndarray | UnusedRows | None, rows: int, seed: int, source: int = 0
    ) -> None:
        self._row_ids = row_ids
        self._size = rows if row_ids is None else len(row_ids)
        self._source = source
        # Grain shuffles epoch e by seed + e: as given, seeds 0 and 1 would be one order, shifted.
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
    orders. The rule is that of Grain's MapDataset.mix, which rounds weights to hundredths of the
    smallest; here they are exact.

    Args:
      orders: At least two, each of a source of its own.
      weights: One for each, positive; only their proportions matter.
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
                f"weights is {tuple(weights)}: weights under a millionth are taken for 0; "
                "scale them up."
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
        """Rows from each order in the positions before this one.

        The first order gets its share, rounded up, the next its share of what is left, and so on.
        A position more adds one to what is left or nothing, and so one row to one order.
        """
        counts, left, parts_left = [], position, sum(self._parts)
        for part in self._parts:
            rest = left * (parts_left - part) // parts_left
            counts.append(left - rest)
            left, parts_left = rest, parts_left - part
        return counts
