"""The rows of highest key among hundreds of millions, exactly, in three passes and some megabytes.

In: for each row a key uint32 (0: never chosen) and a stratum, block by block, as often as asked.
Out: in each stratum the key that its quota of rows reaches down to, and the ids of those rows.
Two histograms find it, of the keys' upper 16 bits and then, where the cut falls, of their lower 16.
Of equal keys the lower row id goes first.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

# (keys uint32 [n], strata [n] or None for a single one) of one block of rows after another.
KeyBlocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]

_HALF = 1 << 16
_ABOVE_ALL = 1 << 32


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where each of S strata is cut.

    Attributes:
      keys: int64 [S]; every row of a greater key is chosen.
      ties: int64 [S]; of the rows of that very key the first so many are chosen too.
    """

    keys: np.ndarray
    ties: np.ndarray


@dataclasses.dataclass(frozen=True)
class KeyCounts:
    """How many rows each of S strata has.

    Attributes:
      high: int64 [S, H]; rows that can be chosen, by the upper half of their key.
      rows: int64 [S]; rows in all.
    """

    high: np.ndarray
    rows: np.ndarray

    @property
    def eligible(self) -> np.ndarray:
        """Rows that can be chosen, [S]."""
        return self.high.sum(axis=1)


def score_keys(scores_n: np.ndarray) -> np.ndarray:
    """Keys in the order of float32 scores; 0 for what is not finite."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        scores_n = np.asarray(scores_n, np.float32) + np.float32(0)  # −0 and 0 are one score
    bits_n = scores_n.view(np.uint32)
    # A negative number's bits ascend as it falls.
    flip_n = (scores_n.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31)
    return np.where(np.isfinite(scores_n), bits_n ^ flip_n, np.uint32(0))


def score_of_key(key: int) -> float:
    """The score that has this key."""
    bits = key ^ (1 << 31) if key >> 31 else key ^ (_ABOVE_ALL - 1)
    return float(np.array(bits, np.uint32).view(np.float32))


def count_keys(blocks: KeyBlocks, strata: int) -> KeyCounts:
    """The first pass."""
    high_SxH = np.zeros((strata, _HALF), np.int64)
    never_S, rows_S = np.zeros(strata, np.int64), np.zeros(strata, np.int64)
    for keys_n, strata_n in blocks():
        high_SxH += _histogram(keys_n >> np.uint32(16), strata_n, strata)
        never_n = keys_n == 0
        if strata_n is None:
            never_S += np.count_nonzero(never_n)
            rows_S += len(keys_n)
        else:
            never_S += np.bincount(strata_n[never_n], minlength=strata)
            rows_S += np.bincount(strata_n, minlength=strata)
    high_SxH[:, 0] -= never_S
    return KeyCounts(high_SxH, rows_S)


def find_cut(blocks: KeyBlocks, counts: KeyCounts, quota_S: np.ndarray) -> Cut:
    """The second pass.

    Args:
      blocks: The rows.
      counts: What the first pass gave.
      quota_S: How many rows to choose of each stratum, at most its eligible ones.
    """
    assert np.all(quota_S <= counts.eligible), f"quotas {quota_S} of {counts.eligible} rows"
    strata = len(quota_S)
    high_S, left_S = _reach_down(counts.high, quota_S)
    low_SxH = np.zeros((strata, _HALF), np.int64)
    for keys_n, strata_n in blocks():
        at_cut_n = keys_n >> np.uint32(16) == (high_S[0] if strata_n is None else high_S[strata_n])
        at_cut_n &= keys_n > 0
        own_n = None if strata_n is None else strata_n[at_cut_n]
        low_SxH += _histogram(keys_n[at_cut_n] & np.uint32(_HALF - 1), own_n, strata)
    low_S, ties_S = _reach_down(low_SxH, left_S)
    none_S = quota_S == 0
    key_S = np.where(none_S, _ABOVE_ALL, (high_S << 16) + low_S)
    return Cut(key_S, np.where(none_S, 0, ties_S))


def chosen_ids(blocks: KeyBlocks, cut: Cut) -> Iterator[np.ndarray]:
    """The third pass: ids int64 of the rows chosen, ascending, block by block."""
    first = 0
    ties_S = cut.ties.copy()
    for keys_n, strata_n in blocks():
        key_n = cut.keys[0] if strata_n is None else cut.keys[strata_n]
        chosen_n = keys_n > key_n
        tied = np.flatnonzero(keys_n == key_n)
        own = np.zeros(len(tied), np.int64) if strata_n is None else strata_n[tied]
        for stratum in np.unique(own):
            taken = tied[own == stratum][: ties_S[stratum]]
            chosen_n[taken] = True
            ties_S[stratum] -= len(taken)
        yield first + np.flatnonzero(chosen_n).astype(np.int64)
        first += len(keys_n)


def apportion(rows: int, weight_S: np.ndarray, most_S: np.ndarray) -> np.ndarray:
    """Shares `rows` out in proportion to the weights, by largest remainder.

    Args:
      rows: At most the sum of most_S.
      weight_S: int64; how many rows each stratum has.
      most_S: int64; the most that each can give. What one can't give the others do, in proportion.

    Returns:
      int64 [S], whose sum is `rows`. Of equal remainders the first goes first.
    """
    assert rows <= most_S.sum(), f"{rows} rows of at most {most_S.sum()}"
    share_S = np.zeros(len(weight_S), np.int64)
    full_S = most_S == 0
    while True:
        left, open_S = rows - int(share_S[full_S].sum()), ~full_S
        weights = [int(weight) for weight in weight_S[open_S]]
        total = max(sum(weights), 1)
        # Whole numbers of Python's: the products don't fit 64 bits.
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


def _histogram(values_n: np.ndarray, strata_n: np.ndarray | None, strata: int) -> np.ndarray:
    """int64 [S, H] of values below 2^16."""
    if strata_n is not None:
        values_n = values_n + strata_n.astype(np.int64) * _HALF
    return np.bincount(values_n, minlength=strata * _HALF).reshape(strata, _HALF)


def _reach_down(counts_SxH: np.ndarray, quota_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the highest bin down: the bin in which each quota is met, and what it takes of it."""
    down_SxH = np.cumsum(counts_SxH[:, ::-1], axis=1)
    place_S = np.argmax(down_SxH >= np.maximum(quota_S, 1)[:, None], axis=1)
    at_S = np.arange(len(quota_S))
    above_S = down_SxH[at_S, place_S] - counts_SxH[at_S, _HALF - 1 - place_S]
    return _HALF - 1 - place_S, quota_S - above_S
