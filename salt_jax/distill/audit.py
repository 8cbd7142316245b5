"""The audit of a selection: which rows were selected and which left out, by subset and overall.

Every function takes columns of the split's N rows and the ascending ids of the selected rows, both
possibly on disk, reads them in blocks of constant size, and returns JSON values.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from salt_jax.distill.selection import RowValues, row_blocks

BINS = 60
SHOWN = 20

_HASH_BYTES = 1 << 28  # of hashes that are sorted at once


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What is known of each of the N rows, by row id.

    Attributes:
      subset_names: The subsets.
      subsets: Indices in them.
      scores: The scores that rows were selected by, in nats; −inf or NaN for none.
      losses: The mean loss of a row's tokens, in nats.
      learnable: The share of learnable tokens.
      hashes: Hashes of the rows' tokens, uint64.
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
    """Rows, shares, means and score histograms of the rows kept and of all.

    Returns:
      score_edges: BINS + 1 bounds of the histograms, in nats.
      whole, by_subset (by name; those with rows): each has rows, kept, kept_share (of its rows),
        share_of_kept (of all kept), lowest_kept (score, in nats), log_perplexity and
        log_perplexity_kept (means of the rows' mean losses), learnable and learnable_kept (mean
        shares), scores and scores_kept (rows in each bin).
    """
    edges, number = _score_edges(facts), len(facts.subset_names)
    everything, selected = _Sums(number, edges), _Sums(number, edges)
    lowest_kept_S = np.full(number, np.inf)
    for block, kept_n in _kept(len(facts), row_ids_m):
        subset_n, scores_n = facts.subsets[block].astype(np.int64), facts.scores[block]
        values = {"log_perplexity": facts.losses[block], "learnable": facts.learnable[block]}
        everything.add(subset_n, scores_n, values)
        of_kept = {name: values_n[kept_n] for name, values_n in values.items()}
        selected.add(subset_n[kept_n], scores_n[kept_n], of_kept)
        scored_n = kept_n & np.isfinite(scores_n)
        np.minimum.at(lowest_kept_S, subset_n[scored_n], scores_n[scored_n])

    def part(subsets: list[int]) -> dict[str, Any]:
        rows, kept = (int(sums.rows_S[subsets].sum()) for sums in (everything, selected))
        lowest = float(lowest_kept_S[subsets].min())
        found: dict[str, Any] = {
            "rows": rows,
            "kept": kept,
            "kept_share": kept / rows,
            "share_of_kept": kept / len(row_ids_m),
            "lowest_kept": lowest if math.isfinite(lowest) else None,
        }
        for name in everything.means:
            for suffix, sums in (("", everything), ("_kept", selected)):
                total, count = sums.means[name][:, subsets].sum(axis=1)
                found[name + suffix] = float(total / count) if count else None
        for suffix, sums in (("", everything), ("_kept", selected)):
            found["scores" + suffix] = sums.scores_SxH[subsets].sum(axis=0).tolist()
        return found

    return {
        "score_edges": edges.tolist(),
        "whole": part(list(range(number))),
        "by_subset": {
            name: part([index])
            for index, name in enumerate(facts.subset_names)
            if everything.rows_S[index]
        },
    }


class _Sums:
    """Sums over rows, by subset.

    Attributes:
      rows_S: Rows.
      scores_SxH: Rows in each bin of the scores.
      means: By name, the sum of a value and the number of rows that have it, [2, S].
    """

    def __init__(self, subsets: int, edges: np.ndarray) -> None:
        self._edges = edges
        self.rows_S = np.zeros(subsets, np.int64)
        self.scores_SxH = np.zeros((subsets, BINS), np.int64)
        self.means: dict[str, np.ndarray] = {}

    def add(
        self, subset_n: np.ndarray, scores_n: np.ndarray, values: dict[str, np.ndarray]
    ) -> None:
        """Adds a block of rows."""
        subsets = len(self.rows_S)
        self.rows_S += np.bincount(subset_n, minlength=subsets)
        scored_n = np.isfinite(scores_n)
        bin_n = np.searchsorted(self._edges, scores_n[scored_n], side="right") - 1
        bin_n = subset_n[scored_n] * BINS + np.clip(bin_n, 0, BINS - 1)
        counts = np.bincount(bin_n, minlength=subsets * BINS)
        self.scores_SxH += counts.reshape(subsets, BINS)
        for name, values_n in values.items():
            finite_n = np.isfinite(values_n)
            own_n = subset_n[finite_n]
            sums = self.means.setdefault(name, np.zeros((2, subsets)))
            sums[0] += np.bincount(own_n, weights=values_n[finite_n], minlength=subsets)
            sums[1] += np.bincount(own_n, minlength=subsets)


def ties(facts: RowFacts, row_ids_m: np.ndarray, cut: float) -> dict[str, int]:
    """Rows whose score is exactly that of the cut: {"rows", "kept"}.

    Of these the lower row ids were selected. If many were left out, the scores don't tell rows
    apart: most medians are 0, for example, where less than half of the tokens are learnable.
    """
    rows = kept = 0
    for block, kept_n in _kept(len(facts), row_ids_m):
        tied_n = facts.scores[block] == np.float32(cut)
        rows += int(np.count_nonzero(tied_n))
        kept += int(np.count_nonzero(tied_n & kept_n))
    return {"rows": rows, "kept": kept}


def overlap(row_ids_m: np.ndarray, others_n: np.ndarray, rows: int) -> dict[str, Any]:
    """How much a selection shares with another one of the same N rows.

    Returns:
      rows (of the other), shared, jaccard (shared rows over those in either), share_of_this,
      share_of_other, and share_by_chance (the share of this selection that a random one of the
      other's size would have).
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
    """Rows that are exact copies of an earlier one: {"all", "kept"}.

    If there are more hashes than may be sorted at once, a pass is made for each range of values.
    """
    rows = len(hashes)
    parts = max(1, math.ceil(rows * 8 / _HASH_BYTES))
    copies = {"all": 0, "kept": 0}
    for part in range(parts):
        found: dict[str, list[np.ndarray]] = {"all": [], "kept": []}
        for block, kept_n in _kept(rows, row_ids_m):
            hash_n = hashes[block]
            own_n = hash_n % np.uint64(parts) == part
            found["all"].append(hash_n[own_n])
            found["kept"].append(hash_n[own_n & kept_n])
        for name, arrays in found.items():
            ordered = np.concatenate(arrays)
            ordered.sort()
            copies[name] += int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    return copies


def rows_to_show(
    facts: RowFacts, row_ids_m: np.ndarray, by_score: bool, stratified: bool = False
) -> dict[str, list[int]]:
    """Ids of example rows.

    `by_score` says whether the kept rows were selected by score, so that there is a cut, and
    `stratified` whether each subset has its own.

    Returns:
      highest and lowest_kept: the SHOWN highest and lowest scores among the rows kept. lowest: the
      lowest scores of all rows. cut_kept and cut_left_out, where there is a cut: half as many on
      either side of it, the nearest first; divided equally among several cuts, at least one each.
    """
    cuts = len(facts.subset_names) if stratified else 1
    each = max(1, SHOWN // 2 // cuts)
    highest, lowest_kept, lowest = _Best(SHOWN, 1), _Best(SHOWN, -1), _Best(SHOWN, -1)
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
    """The rows of highest (sign 1) or lowest (sign −1) score; of equal scores the lower ids."""

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
        """Their ids, the best first."""
        return self._ids.tolist()


def _score_edges(facts: RowFacts) -> np.ndarray:
    lowest, highest = np.inf, -np.inf
    for block in row_blocks(len(facts)):
        scores_n = facts.scores[block]
        finite_n = scores_n[np.isfinite(scores_n)]
        lowest = min(lowest, float(finite_n.min(initial=np.inf)))
        highest = max(highest, float(finite_n.max(initial=-np.inf)))
    if lowest > highest:
        lowest = highest = 0.0
    return np.linspace(lowest, max(highest, lowest + 1e-6), BINS + 1)


def _kept(rows: int, row_ids_m: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Each block of rows, and which of them were kept."""
    for block in row_blocks(rows):
        first, last = np.searchsorted(row_ids_m, [block.start, block.stop])
        kept_n = np.zeros(block.stop - block.start, bool)
        kept_n[np.asarray(row_ids_m[first:last]) - block.start] = True
        yield block, kept_n
