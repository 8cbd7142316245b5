"""Which rows stage 1 trains on: the rows' scores in, the ids of the rows chosen out, ascending.

By score, a row whose score is not finite is never chosen, and of equal scores the lower row id goes
first, so that the same scores give the same rows everywhere. `stratified` takes the same fraction
of every subset: as many rows in all, shared out in proportion to the subsets' rows by largest
remainder; what a subset has too few scored rows for, the others give.

Scores are read block by block and several times, never whole: hundreds of millions of rows are
usual.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from salt_jax.distill import order_statistics
from salt_jax.errors import InputError

_BLOCK_ROWS = 1 << 20
_LOT_ROWS = 1 << 16  # rows whose lots are drawn together


class RowValues(Protocol):
    """One value a row: an array, or a column on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Those of a slice, or of an array of ids."""
        ...


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows to choose from.

    Attributes:
      rows: N.
      scores: float32 [N], by row id; None where there are none, which RandomRows doesn't need.
      subsets: [N], whole numbers below `num_subsets`; needed by a stratified rule alone.
      num_subsets: How many subsets there are.
    """

    rows: int
    scores: Any = None
    subsets: Any = None
    num_subsets: int = 0

    @classmethod
    def of(cls, scores_N: RowValues, subsets_N: Any = None, num_subsets: int = 0) -> "Candidates":
        """Rows with scores."""
        return cls(len(scores_N), scores_N, subsets_N, num_subsets)

    def blocks(self) -> Iterator[slice]:
        """All rows in slices."""
        for first in range(0, self.rows, _BLOCK_ROWS):
            yield slice(first, min(first + _BLOCK_ROWS, self.rows))


@dataclasses.dataclass(frozen=True)
class RowChoice:
    """The rows that a rule has chosen.

    Attributes:
      rows: How many.
      cut: The lowest score among them; None for a choice that no score made.
      blocks: Gives their ids, int64 and ascending, array by array.
    """

    rows: int
    cut: float | None
    blocks: Callable[[], Iterator[np.ndarray]]


class SelectionRule(Protocol):
    """What every rule of this module can do."""

    stratified: bool

    def select(self, candidates: Candidates) -> RowChoice:
        """The rows chosen."""
        ...


@dataclasses.dataclass(frozen=True)
class TopRows:
    """The m rows of highest score."""

    m: int
    stratified: bool = False

    def __post_init__(self) -> None:
        _check_rows(self, self.m)

    def select(self, candidates: Candidates) -> RowChoice:
        highest = _Highest(candidates, _by_score(candidates), self.stratified)
        if self.m > highest.eligible:
            raise InputError(
                f"TopRows.m is {self.m}, but only {highest.eligible} of {candidates.rows} rows "
                "have a score; set m to at most that, or prepare more text."
            )
        return highest.choose(self.m)


@dataclasses.dataclass(frozen=True)
class TopFraction:
    """The rows of highest score: `fraction` of all N rows.

    Rounded down, but at least one row, and at most those that have a score.
    """

    fraction: float
    stratified: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(
                f"TopFraction.fraction is {self.fraction}; set it above 0 and to at most 1."
            )

    def select(self, candidates: Candidates) -> RowChoice:
        highest = _Highest(candidates, _by_score(candidates), self.stratified)
        if not highest.eligible:
            raise InputError(
                "No row has a score, so TopFraction selects nothing; check the scorer and its k."
            )
        # The tiny excess makes 0.29 of 100 rows 29, which binary fractions otherwise make 28.
        rows = max(1, math.floor(self.fraction * candidates.rows * (1.0 + 1e-12)))
        return highest.choose(min(rows, highest.eligible))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every row with a score of at least `threshold` nats; stratified, as many rows as those."""

    threshold: float
    stratified: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise InputError(
                f"Threshold.threshold is {self.threshold}; set it to a finite number of nats."
            )

    def select(self, candidates: Candidates) -> RowChoice:
        rows, highest_score = 0, -np.inf
        for block in candidates.blocks():
            scores_n = candidates.scores[block]
            has_score_n = np.isfinite(scores_n)
            reach_n = scores_n >= np.float32(self.threshold)
            rows += int(np.count_nonzero(reach_n & has_score_n))
            highest_score = np.max(scores_n, where=has_score_n, initial=highest_score)
        if not rows:
            raise InputError(
                f"Threshold.threshold is {self.threshold}, above every score "
                f"(the highest is {highest_score}); lower it."
            )
        return _Highest(candidates, _by_score(candidates), self.stratified).choose(rows)


@dataclasses.dataclass(frozen=True)
class RandomRows:
    """Rows by lot, whatever their scores: the control that tells the score's effect from that of
    fewer rows.

    Attributes:
      m: How many.
      like: Instead of m: the folder of a selection, to draw as many rows as it has.
      seed: Of the lots. A row's lot depends on the seed and its id alone.
      stratified: Whether to take the same fraction of every subset.
    """

    m: int | None = None
    like: str = ""
    seed: int = 0
    stratified: bool = False

    def __post_init__(self) -> None:
        if (self.m is None) == (not self.like):
            raise InputError(
                f"RandomRows.m is {self.m} and RandomRows.like {self.like!r}: set one of them."
            )
        if self.m is not None:
            _check_rows(self, self.m)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63:
            raise InputError(
                f"RandomRows.seed is {self.seed!r}; set it to a whole number, 0 or more."
            )

    def select(self, candidates: Candidates) -> RowChoice:
        assert self.m is not None, "RandomRows.like must be looked up first"
        if self.m > candidates.rows:
            raise InputError(
                f"RandomRows.m is {self.m}, but there are only {candidates.rows} rows; "
                "set m to at most that."
            )
        by_lot = functools.partial(_lots, self.seed)
        choice = _Highest(candidates, by_lot, self.stratified).choose(self.m)
        return dataclasses.replace(choice, cut=None)


class _Highest:
    """The rows of highest key.

    Args:
      candidates: The rows.
      keys: Gives the keys, uint32, of a slice of them.
      stratified: Whether each subset is a stratum of its own.
    """

    def __init__(
        self, candidates: Candidates, keys: Callable[[slice], np.ndarray], stratified: bool
    ) -> None:
        self._candidates, self._keys, self._stratified = candidates, keys, stratified
        strata = candidates.num_subsets if stratified else 1
        assert not stratified or candidates.subsets is not None, "strata need subsets"
        self._counts = order_statistics.count_keys(self._blocks, strata)
        self.eligible = int(self._counts.eligible.sum())

    def choose(self, rows: int) -> RowChoice:
        """The `rows` highest, at most `eligible`."""
        eligible_S = self._counts.eligible
        quota_S = order_statistics.apportion(rows, self._counts.rows, eligible_S)
        cut = order_statistics.find_cut(self._blocks, self._counts, quota_S)
        lowest = order_statistics.score_of_key(int(cut.keys.min()))
        return RowChoice(
            rows, lowest, functools.partial(order_statistics.chosen_ids, self._blocks, cut)
        )

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for block in self._candidates.blocks():
            yield self._keys(block), self._candidates.subsets[block] if self._stratified else None


def _by_score(candidates: Candidates) -> Callable[[slice], np.ndarray]:
    return lambda block: order_statistics.score_keys(candidates.scores[block])


def _lots(seed: int, block: slice) -> np.ndarray:
    """Random keys of the rows of a slice, which are the same however the rows are cut."""
    first = block.start // _LOT_ROWS
    parts = [
        np.random.Generator(np.random.Philox(key=[seed, number])).integers(
            1, 1 << 32, _LOT_ROWS, dtype=np.uint32
        )
        for number in range(first, -(-block.stop // _LOT_ROWS))
    ]
    return np.concatenate(parts)[block.start - first * _LOT_ROWS :][: block.stop - block.start]


def _check_rows(rule: object, m: int) -> None:
    if not isinstance(m, int) or isinstance(m, bool) or m < 1:
        raise InputError(
            f"{type(rule).__name__}.m is {m!r}; set it to a whole number of rows, at least 1."
        )
