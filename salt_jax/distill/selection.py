"""Selection rules: which rows stage 1 trains on, from the scores of all rows.

A row whose score is not finite is never selected by score, and of equal scores the lower row id
comes first, so that the same scores give the same rows everywhere. `stratified` selects the same
fraction of every subset: the same number of rows in all, apportioned to the subsets' rows by
largest remainder. If a subset has too few scored rows, the others make up for it.

numpy.partition finds the cut among one 4-byte key per row in memory (425 million rows: 1.7 GB).
Everything else is read in blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from salt_jax.errors import InputError

_BLOCK_ROWS = 1 << 20
_DRAWN_ROWS = 1 << 16  # rows whose random keys are drawn together


class RowValues(Protocol):
    """One value per row: an array, or a column on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The values of a slice of rows, or of an array of ids."""
        ...


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows to select from.

    Attributes:
      rows: N.
      scores: float32 [N], by row id; None for RandomRows, which needs none.
      subsets: uint16 [N], below `num_subsets`; for stratified rules only.
      num_subsets: How many subsets there are.
    """

    rows: int
    scores: RowValues | None = None
    subsets: RowValues | None = None
    num_subsets: int = 0


def row_blocks(rows: int) -> Iterator[slice]:
    """All rows in slices of constant size."""
    for first in range(0, rows, _BLOCK_ROWS):
        yield slice(first, min(first + _BLOCK_ROWS, rows))


@dataclasses.dataclass(frozen=True)
class RowChoice:
    """The rows that a rule has selected.

    Attributes:
      rows: Their number.
      cut: The lowest score among them; None for a random choice.
      blocks: Returns their ids, int64 and ascending, array by array.
    """

    rows: int
    cut: float | None
    blocks: Callable[[], Iterator[np.ndarray]]


class SelectionRule(Protocol):
    """A rule of `salt select`."""

    stratified: bool

    def select(self, candidates: Candidates) -> RowChoice:
        """Selects rows."""
        ...


@dataclasses.dataclass(frozen=True)
class TopRows:
    """The m rows with the highest scores.

    Attributes:
      m: Number of rows.
      stratified: Whether to select the same fraction of every subset.
      most_of_subset: The largest share of the selected rows that one subset may have; None for
        any.
    """

    m: int
    stratified: bool = False
    most_of_subset: float | None = None

    def __post_init__(self) -> None:
        _check_rows(self, self.m)
        _check_share(self, self.most_of_subset)

    def select(self, candidates: Candidates) -> RowChoice:
        scores, share = _scores(candidates), self.most_of_subset
        highest = _Highest(candidates, scores, self.stratified, share)
        if self.m > highest.eligible:
            raise InputError(
                f"TopRows.m is {self.m}, but only {highest.eligible} of {candidates.rows} rows "
                "have a score; set m to at most that, or prepare more text."
            )
        return highest.choose(self.m)


@dataclasses.dataclass(frozen=True)
class TopFraction:
    """The rows with the highest scores: `fraction` of all N rows.

    Rounded down, but at least one row and at most those with a score. `stratified` and
    `most_of_subset` as in TopRows.
    """

    fraction: float
    stratified: bool = False
    most_of_subset: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(
                f"TopFraction.fraction is {self.fraction}; set it above 0 and to at most 1."
            )
        _check_share(self, self.most_of_subset)

    def select(self, candidates: Candidates) -> RowChoice:
        scores, share = _scores(candidates), self.most_of_subset
        highest = _Highest(candidates, scores, self.stratified, share)
        if not highest.eligible:
            raise InputError(
                "No row has a score, so TopFraction selects nothing; check the scorer and its k."
            )
        # The tiny excess makes 0.29 of 100 rows 29; in binary fractions it would be 28.
        rows = max(1, math.floor(self.fraction * candidates.rows * (1.0 + 1e-12)))
        return highest.choose(min(rows, highest.eligible))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """All rows with a score of at least `threshold` nats, or as many rows, stratified."""

    threshold: float
    stratified: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise InputError(
                f"Threshold.threshold is {self.threshold}; set it to a finite number of nats."
            )

    def select(self, candidates: Candidates) -> RowChoice:
        highest = _Highest(candidates, _scores(candidates), self.stratified)
        # Clipped, since -inf is the key of rows without a score.
        limits = np.finfo(np.float32)
        rows = highest.rows_from(np.float32(np.clip(self.threshold, limits.min, limits.max)))
        if not rows:
            raise InputError(
                f"Threshold.threshold is {self.threshold}, above every score "
                f"(the highest is {highest.largest}); lower it."
            )
        return highest.choose(rows)


@dataclasses.dataclass(frozen=True)
class RandomRows:
    """Random rows: the control that separates the scores' effect from that of fewer rows.

    Attributes:
      m: Number of rows.
      like: Instead of m, the folder of a selection with that number of rows.
      seed: A row's random key depends on this and the row's id alone.
      stratified: Whether to select the same fraction of every subset.
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
        random_keys = functools.partial(_random_keys, self.seed)
        choice = _Highest(candidates, random_keys, self.stratified).choose(self.m)
        return dataclasses.replace(choice, cut=None)


class _Highest:
    """The rows with the highest keys.

    Args:
      candidates: The rows.
      keys: Returns the keys of a slice of rows; a row with -inf is never selected.
      stratified: Whether to choose the same fraction of every subset.
      most_of_subset: The largest share of the chosen rows that one subset may have.
    """

    def __init__(
        self,
        candidates: Candidates,
        keys: Callable[[slice], np.ndarray],
        stratified: bool,
        most_of_subset: float | None = None,
    ) -> None:
        self._candidates, self._keys, self._stratified = candidates, keys, stratified
        self._share = most_of_subset
        self._has_strata = stratified or most_of_subset is not None
        strata = candidates.num_subsets if self._has_strata else 1
        self._rows_S = np.zeros(strata, np.int64)
        for block in row_blocks(candidates.rows):
            self._rows_S += np.bincount(self._strata(block), minlength=strata)
        ends_S = np.cumsum(self._rows_S)
        keys_N = np.empty(candidates.rows, keys(slice(0, 1)).dtype)
        self._stratum_keys = np.split(keys_N, ends_S[:-1])
        filled_S = ends_S - self._rows_S
        for block in row_blocks(candidates.rows):
            strata_n = self._strata(block)
            ordered_n = keys(block)[np.argsort(strata_n, kind="stable")]
            count_S = np.bincount(strata_n, minlength=strata)
            for stratum, part in enumerate(np.split(ordered_n, np.cumsum(count_S)[:-1])):
                keys_N[filled_S[stratum] : filled_S[stratum] + len(part)] = part
            filled_S += count_S
        self._eligible_S = self._count(lambda keys: keys > -np.inf)
        self.eligible = int(self._eligible_S.sum())

    @property
    def largest(self) -> float:
        """The highest key."""
        return float(max(keys.max(initial=-np.inf) for keys in self._stratum_keys))

    def rows_from(self, least: np.float32) -> int:
        """The number of rows with a key of at least this."""
        return int(self._count(lambda keys: keys >= least).sum())

    def choose(self, rows: int) -> RowChoice:
        """The `rows` highest, at most `eligible`; to be called once."""
        most_S = self._eligible_S
        if self._share is not None:
            most_S = np.minimum(most_S, math.floor(self._share * rows * (1.0 + 1e-12)))
        if most_S.sum() < rows:
            raise InputError(
                f"most_of_subset is {self._share}, with which only {most_S.sum()} of the {rows} "
                "rows can be selected: raise it, or select fewer."
            )
        if self._has_strata and not self._stratified:
            quota_S = self._highest_of_each(rows, most_S)
        else:
            quota_S = apportion(rows, self._rows_S, most_S)
        cut_S = np.zeros(len(quota_S), self._stratum_keys[0].dtype)
        ties_S = np.zeros(len(quota_S), np.int64)
        for stratum, (keys, quota) in enumerate(zip(self._stratum_keys, quota_S, strict=True)):
            if quota:
                keys.partition(len(keys) - quota)
                cut_S[stratum] = keys[-quota]
                ties_S[stratum] = quota - np.count_nonzero(keys[-quota:] > cut_S[stratum])
            elif len(keys):
                cut_S[stratum] = keys.max()
        self._stratum_keys = []
        blocks = functools.partial(self._chosen_ids, cut_S, ties_S)
        return RowChoice(rows, float(np.min(cut_S[quota_S > 0])), blocks)

    def _highest_of_each(self, rows: int, most_S: np.ndarray) -> np.ndarray:
        """How many of the `rows` highest each stratum has, if it may have at most so many; of equal
        keys at the cut those of the first stratum come first."""
        highest = [np.empty(0, self._stratum_keys[0].dtype)] * len(most_S)
        for stratum, (keys, most) in enumerate(zip(self._stratum_keys, most_S, strict=True)):
            if most:
                keys.partition(len(keys) - most)
                highest[stratum] = keys[-most:]
        joined = np.concatenate(highest)
        joined.partition(len(joined) - rows)
        cut = joined[len(joined) - rows]
        quota_S = np.array([np.count_nonzero(keys > cut) for keys in highest], np.int64)
        for stratum, keys in enumerate(highest):
            tied = np.count_nonzero(keys == cut)
            quota_S[stratum] += min(tied, rows - int(quota_S.sum()))
        return quota_S

    def _chosen_ids(self, cut_S: np.ndarray, ties_S: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of rows above their stratum's cut, and of the first `ties_S` with its key."""
        ties_S = ties_S.copy()
        for block in row_blocks(self._candidates.rows):
            keys_n, strata_n = self._keys(block), self._strata(block)
            cut_n = cut_S[strata_n]
            chosen_n = keys_n > cut_n
            tied = np.flatnonzero(keys_n == cut_n)
            for stratum in np.unique(strata_n[tied]):
                taken = tied[strata_n[tied] == stratum][: ties_S[stratum]]
                chosen_n[taken] = True
                ties_S[stratum] -= len(taken)
            yield block.start + np.flatnonzero(chosen_n).astype(np.int64)

    def _count(self, which: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.array([np.count_nonzero(which(keys)) for keys in self._stratum_keys], np.int64)

    def _strata(self, block: slice) -> np.ndarray:
        if not self._has_strata:
            return np.zeros(block.stop - block.start, np.uint16)
        assert self._candidates.subsets is not None, "strata need subsets"
        return self._candidates.subsets[block]


def apportion(rows: int, weight_S: np.ndarray, most_S: np.ndarray) -> np.ndarray:
    """Apportions `rows` to strata in proportion to their weights, by largest remainder.

    Args:
      rows: At most the sum of most_S.
      weight_S: int64; the rows of each stratum.
      most_S: int64; the most rows that each can give. The others make up the rest, in proportion.

    Returns:
      int64 [S], whose sum is `rows`. Of equal remainders the first stratum comes first.
    """
    assert rows <= most_S.sum(), f"{rows} rows of at most {most_S.sum()}"
    share_S = np.zeros(len(weight_S), np.int64)
    full_S = most_S == 0
    while True:
        left, open_S = rows - int(share_S[full_S].sum()), ~full_S
        weights = [int(weight) for weight in weight_S[open_S]]
        total = max(sum(weights), 1)
        # Python integers, since the products don't fit into 64 bits.
        parts = [divmod(left * weight, total) for weight in weights]
        short = left - sum(whole for whole, _ in parts)
        by_remainder = sorted(range(len(parts)), key=lambda i: (-parts[i][1], i))
        extra = set(by_remainder[:short])
        share_S[open_S] = [whole + (i in extra) for i, (whole, _) in enumerate(parts)]
        over_S = open_S & (share_S > most_S)
        if not over_S.any():
            return share_S
        share_S[over_S] = most_S[over_S]
        full_S |= over_S


def _scores(candidates: Candidates) -> Callable[[slice], np.ndarray]:
    """Keys by score, float32."""
    scores_N = candidates.scores
    assert scores_N is not None, "a rule by score needs scores"

    def keys(block: slice) -> np.ndarray:
        scores_n = np.asarray(scores_N[block], np.float32)
        return np.where(np.isfinite(scores_n), scores_n, np.float32(-np.inf))

    return keys


def _random_keys(seed: int, block: slice) -> np.ndarray:
    """Random keys, uint32, of a slice of rows, independent of the size of blocks."""
    first = block.start // _DRAWN_ROWS
    parts = [
        np.random.Generator(np.random.Philox(key=[seed, number])).integers(
            1, 1 << 32, _DRAWN_ROWS, dtype=np.uint32
        )
        for number in range(first, -(-block.stop // _DRAWN_ROWS))
    ]
    return np.concatenate(parts)[block.start - first * _DRAWN_ROWS :][: block.stop - block.start]


def _check_share(rule: object, share: float | None) -> None:
    if share is not None and not 0.0 < share <= 1.0:
        raise InputError(
            f"{type(rule).__name__}.most_of_subset is {share!r}; set it above 0 and to at most 1."
        )


def _check_rows(rule: object, m: int) -> None:
    if not isinstance(m, int) or isinstance(m, bool) or m < 1:
        raise InputError(
            f"{type(rule).__name__}.m is {m!r}; set it to a whole number of rows, at least 1."
        )
