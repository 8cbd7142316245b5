"""What a selection took and what it left: the numbers of its audit, by subset and in whole.

In: columns of the split's N rows and the ids of those selected, ascending. Out: JSON values. All is
read block by block, several times; nothing grows with N but the ids, which may lie on disk.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.distill.selection import RowValues

BINS = 60
EXAMPLES = 20

_BLOCK_ROWS = 1 << 20
_HASH_BYTES = 1 << 28  # of hashes that are sorted at once


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What is known of each of the N rows, by row id.

    Attributes:
      subset_names: The subsets.
      subsets: Indices in them.
      scores: What was selected by, in nats; −inf or NaN for none.
      losses: The mean loss of a row's tokens, in nats.
      learnable: The share of learnable tokens.
      hashes: Of the row's tokens, uint64.
    """

    subset_names: Sequence[str]
    subsets: RowValues
    scores: RowValues
    losses: RowValues
    learnable: RowValues
    hashes: RowValues

    def __len__(self) -> int:
        return len(self.scores)


def by_subset(facts: RowFacts, row_ids_m: np.ndarray) -> dict[str, Any]:
    """Rows, shares, means and score histograms of what was kept and of all.

    Returns:
      score_edges: BINS + 1 bounds of the histograms, in nats.
      whole, by_subset (by name; those with rows): each has rows, kept, kept_share (of its rows),
        share_of_kept (of all kept), lowest_kept (score, in nats), log_perplexity and
        log_perplexity_kept (means of the rows' mean losses), learnable and learnable_kept (mean
        shares), scores and scores_kept (rows in each bin).
    """
    edges = _score_edges(facts)
    number = len(facts.subset_names)
    sums = _Sums(number, edges)
    for block, kept_n in _kept(len(facts), row_ids_m):
        values = (facts.scores[block], facts.losses[block], facts.learnable[block])
        sums.add(facts.subsets[block].astype(np.int64), kept_n, *values)
    names = [name for i, name in enumerate(facts.subset_names) if sums.rows_2xS[0, i]]
    of_subset = {name: sums.part([facts.subset_names.index(name)]) for name in names}
    return {
        "score_edges": [float(edge) for edge in edges],
        "whole": sums.part(list(range(number))),
        "by_subset": of_subset,
    }


class _Sums:
    """Sums over all rows ([0]) and over those kept ([1]), by subset."""

    def __init__(self, subsets: int, edges: np.ndarray) -> None:
        self._subsets, self._edges = subsets, edges
        self.rows_2xS = np.zeros((2, subsets), np.int64)
        self._means: dict[str, np.ndarray] = {
            name: np.zeros((2, 2, subsets)) for name in ("log_perplexity", "learnable")
        }
        self._histogram_2xSxH = np.zeros((2, subsets, len(edges) - 1), np.int64)
        self._lowest_kept_S = np.full(subsets, np.inf)

    def add(
        self,
        subset_n: np.ndarray,
        kept_n: np.ndarray,
        scores_n: np.ndarray,
        losses_n: np.ndarray,
        learnable_n: np.ndarray,
    ) -> None:
        """Adds a block of rows."""
        bins = len(self._edges) - 1
        has_score_n = np.isfinite(scores_n)
        scored_n = kept_n & has_score_n
        np.minimum.at(self._lowest_kept_S, subset_n[scored_n], scores_n[scored_n])
        place_n = np.searchsorted(self._edges, scores_n, side="right") - 1
        place_n = subset_n * bins + np.clip(place_n, 0, bins - 1)
        for which, mask_n in enumerate((np.ones(len(kept_n), bool), kept_n)):
            self.rows_2xS[which] += np.bincount(subset_n[mask_n], minlength=self._subsets)
            counted = np.bincount(place_n[mask_n & has_score_n], minlength=self._subsets * bins)
            self._histogram_2xSxH[which] += counted.reshape(self._subsets, bins)
            for name, values_n in (("log_perplexity", losses_n), ("learnable", learnable_n)):
                finite_n = mask_n & np.isfinite(values_n)
                own_n = subset_n[finite_n]
                self._means[name][which, 0] += np.bincount(
                    own_n, weights=values_n[finite_n], minlength=self._subsets
                )
                self._means[name][which, 1] += np.bincount(own_n, minlength=self._subsets)

    def part(self, subsets: Sequence[int]) -> dict[str, Any]:
        """What there is to say of some subsets together."""
        rows, kept = (int(self.rows_2xS[which, subsets].sum()) for which in (0, 1))
        all_kept = int(self.rows_2xS[1].sum())
        lowest = float(self._lowest_kept_S[subsets].min())
        found: dict[str, Any] = {
            "rows": rows,
            "kept": kept,
            "kept_share": _ratio(kept, rows),
            "share_of_kept": _ratio(kept, all_kept),
            "lowest_kept": lowest if math.isfinite(lowest) else None,
        }
        for name, sums_2x2xS in self._means.items():
            for which, suffix in ((0, ""), (1, "_kept")):
                total, count = sums_2x2xS[which][:, subsets].sum(axis=1)
                found[name + suffix] = _ratio(float(total), float(count))
        for which, suffix in ((0, ""), (1, "_kept")):
            counts_H = self._histogram_2xSxH[which, subsets].sum(axis=0)
            found["scores" + suffix] = [int(count) for count in counts_H]
        return found


def ties(facts: RowFacts, row_ids_m: np.ndarray, cut: float) -> dict[str, int]:
    """Rows that have exactly the score of the cut: {"rows", "kept"}.

    Among them the selection went by row id. Many that were left out mean that the scores don't tell
    rows apart, as where most medians are 0 because less than half of a row's tokens are learnable.
    """
    rows = kept = 0
    for block, kept_n in _kept(len(facts), row_ids_m):
        tied_n = facts.scores[block] == np.float32(cut)
        rows += int(np.count_nonzero(tied_n))
        kept += int(np.count_nonzero(tied_n & kept_n))
    return {"rows": rows, "kept": kept}


def overlap(row_ids_m: np.ndarray, others_n: np.ndarray, rows: int) -> dict[str, Any]:
    """How much of a selection another one has, of the same N rows.

    Returns:
      rows (of the other), shared, jaccard (shared rows over those in either), share_of_this,
      share_of_other, and share_by_chance (what share of this one a random one of the other's size
      would have).
    """
    shared = 0
    for (_, kept_n), (_, other_n) in zip(
        _kept(rows, row_ids_m), _kept(rows, others_n), strict=True
    ):
        shared += int(np.count_nonzero(kept_n & other_n))
    mine, theirs = len(row_ids_m), len(others_n)
    return {
        "rows": theirs,
        "shared": shared,
        "jaccard": shared / (mine + theirs - shared),
        "share_of_this": shared / mine,
        "share_of_other": shared / theirs,
        "share_by_chance": theirs / rows,
    }


def duplicates(hashes: RowValues, row_ids_m: np.ndarray) -> dict[str, int]:
    """Rows that are exact copies of another one, beyond the first of them: {"all", "kept"}.

    Where there are more hashes than may be sorted at once, they are taken part by part, by their
    value, each part in a pass of its own.
    """
    rows = len(hashes)
    parts = max(1, math.ceil(rows * 8 / _HASH_BYTES))
    copies = {"all": 0, "kept": 0}
    for part in range(parts):
        found: dict[str, list[np.ndarray]] = {"all": [], "kept": []}
        for block, kept_n in _kept(rows, row_ids_m):
            hash_n = hashes[block]
            own_n = hash_n % np.uint64(parts) == part if parts > 1 else np.ones(len(hash_n), bool)
            found["all"].append(hash_n[own_n])
            found["kept"].append(hash_n[own_n & kept_n])
        for name, arrays in found.items():
            ordered = np.concatenate(arrays)
            ordered.sort()
            copies[name] += int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    return copies


def examples(
    facts: RowFacts, row_ids_m: np.ndarray, by_score: bool, stratified: bool = False
) -> dict[str, list[int]]:
    """Ids of rows to look at.

    Args:
      facts: The rows.
      row_ids_m: Those kept.
      by_score: Whether they were selected by their scores, so that there is a cut.
      stratified: Whether each subset has a cut of its own.

    Returns:
      highest and lowest_kept: the EXAMPLES highest and lowest scores among those kept. lowest: the
      lowest of all rows that have a score. cut_kept and cut_left_out, where there is a cut: half as
      many on either side of it, the nearest first; of several cuts, cut by cut, an equal part at
      each and at least one row.
    """
    cuts = len(facts.subset_names) if stratified else 1
    each = max(1, EXAMPLES // 2 // cuts)
    highest, lowest_kept = _Best(EXAMPLES, 1), _Best(EXAMPLES, -1)
    lowest = _Best(EXAMPLES, -1)
    cut_kept, left_out = ([_Best(each, sign) for _ in range(cuts)] for sign in (-1, 1))
    for block, kept_n in _kept(len(facts), row_ids_m):
        scores_n = facts.scores[block]
        has_score_n = np.isfinite(scores_n)
        for best, mask_n in ((highest, kept_n), (lowest_kept, kept_n), (lowest, has_score_n)):
            best.add(block.start, scores_n, mask_n & has_score_n)
        for cut in range(cuts if by_score else 0):
            own_n = has_score_n & (facts.subsets[block] == cut) if stratified else has_score_n
            cut_kept[cut].add(block.start, scores_n, own_n & kept_n)
            left_out[cut].add(block.start, scores_n, own_n & ~kept_n)
    found = {"highest": highest.row_ids, "lowest_kept": lowest_kept.row_ids}
    if by_score:
        found["cut_kept"] = [row_id for best in cut_kept for row_id in best.row_ids]
        found["cut_left_out"] = [row_id for best in left_out for row_id in best.row_ids]
    return {**found, "lowest": lowest.row_ids}


class _Best:
    """The rows of the highest (sign 1) or lowest (sign −1) scores; of equal ones the lower ids."""

    def __init__(self, number: int, sign: int) -> None:
        self._number, self._sign = number, sign
        self._keys, self._ids = np.zeros(0, np.float32), np.zeros(0, np.int64)

    def add(self, first: int, scores_n: np.ndarray, mask_n: np.ndarray) -> None:
        """Adds rows first, first + 1, … where the mask is set."""
        if len(self._keys) == self._number:
            mask_n = mask_n & (self._sign * scores_n > self._keys[-1])
        places = np.flatnonzero(mask_n)
        keys = np.concatenate([self._keys, self._sign * scores_n[places]])
        ids = np.concatenate([self._ids, first + places])
        order = np.lexsort((ids, -keys))[: self._number]
        self._keys, self._ids = keys[order], ids[order]

    @property
    def row_ids(self) -> list[int]:
        """The best first."""
        return [int(row_id) for row_id in self._ids]


def _score_edges(facts: RowFacts) -> np.ndarray:
    lowest, highest = np.inf, -np.inf
    for block in _blocks(len(facts)):
        scores_n = facts.scores[block]
        finite_n = scores_n[np.isfinite(scores_n)]
        lowest = min(lowest, float(finite_n.min(initial=np.inf)))
        highest = max(highest, float(finite_n.max(initial=-np.inf)))
    if lowest > highest:
        lowest = highest = 0.0
    return np.linspace(lowest, max(highest, lowest + 1e-6), BINS + 1)


def _blocks(rows: int) -> Iterator[slice]:
    for first in range(0, rows, _BLOCK_ROWS):
        yield slice(first, min(first + _BLOCK_ROWS, rows))


def _kept(rows: int, row_ids_m: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Each block of rows, and which of them were kept."""
    for block in _blocks(rows):
        first, last = np.searchsorted(row_ids_m, [block.start, block.stop])
        kept_n = np.zeros(block.stop - block.start, bool)
        kept_n[np.asarray(row_ids_m[first:last]) - block.start] = True
        yield block, kept_n


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def without_histograms(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of `by_subset` as short as a summary wants it."""
    return {name: value for name, value in part.items() if not isinstance(value, list)}
