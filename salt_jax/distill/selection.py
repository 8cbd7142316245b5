"""Which rows stage 1 trains on: one score a row in, the chosen row ids out, ascending.

By score, a row of score -inf or NaN is never chosen, and of equal scores the lower row id goes
first, so that the same scores give the same rows everywhere.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

from salt_jax.errors import InputError


class SelectionRule(Protocol):
    """What every rule of this module can do."""

    def select(self, scores_N: np.ndarray) -> np.ndarray:
        """Ids, int64 and ascending, of the rows chosen; row i has the score scores_N[i]."""
        ...


@dataclasses.dataclass(frozen=True)
class TopRows:
    """The m rows of highest score."""

    m: int

    def __post_init__(self) -> None:
        _check_rows(self, self.m)

    def select(self, scores_N: np.ndarray) -> np.ndarray:
        scored = int(np.count_nonzero(_has_score(scores_N)))
        if self.m > scored:
            raise InputError(
                f"TopRows.m is {self.m}, but only {scored} of {len(scores_N)} rows have a score; "
                "set m to at most that, or prepare more text."
            )
        return _highest(scores_N, self.m)


@dataclasses.dataclass(frozen=True)
class TopFraction:
    """The rows of highest score: `fraction` of all N rows.

    Rounded down, but at least one row, and at most those that have a score.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(
                f"TopFraction.fraction is {self.fraction}; set it above 0 and to at most 1."
            )

    def select(self, scores_N: np.ndarray) -> np.ndarray:
        scored = int(np.count_nonzero(_has_score(scores_N)))
        if not scored:
            raise InputError(
                "No row has a score, so TopFraction selects nothing; check the scorer and its k."
            )
        # The tiny excess makes 0.29 of 100 rows 29, which binary fractions otherwise make 28.
        rows = max(1, math.floor(self.fraction * len(scores_N) * (1.0 + 1e-12)))
        return _highest(scores_N, min(rows, scored))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every row with a score of at least `threshold` nats."""

    threshold: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise InputError(
                f"Threshold.threshold is {self.threshold}; set it to a finite number of nats."
            )

    def select(self, scores_N: np.ndarray) -> np.ndarray:
        row_ids = np.flatnonzero(scores_N >= self.threshold).astype(np.int64)
        if not len(row_ids):
            highest = np.max(scores_N, where=_has_score(scores_N), initial=-np.inf)
            raise InputError(
                f"Threshold.threshold is {self.threshold}, above every score "
                f"(the highest is {highest}); lower it."
            )
        return row_ids


@dataclasses.dataclass(frozen=True)
class RandomRows:
    """m rows by lot, whatever their scores: the control that tells the score's effect from that of
    fewer rows."""

    m: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rows(self, self.m)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(
                f"RandomRows.seed is {self.seed!r}; set it to a whole number, 0 or more."
            )

    def select(self, scores_N: np.ndarray) -> np.ndarray:
        if self.m > len(scores_N):
            raise InputError(
                f"RandomRows.m is {self.m}, but there are only {len(scores_N)} rows; "
                "set m to at most that."
            )
        chosen = np.random.default_rng(self.seed).choice(len(scores_N), size=self.m, replace=False)
        return np.sort(chosen).astype(np.int64)


def _has_score(scores_N: np.ndarray) -> np.ndarray:
    return scores_N > -np.inf  # False for NaN too


def _highest(scores_N: np.ndarray, rows: int) -> np.ndarray:
    """Ids of the `rows` highest scores, the lower id first among equals."""
    keys_N = np.where(_has_score(scores_N), -scores_N, np.inf)
    # A partition instead of a stable sort of everything: hundreds of millions of rows are usual.
    cut = np.partition(keys_N, rows - 1)[rows - 1]
    better = np.flatnonzero(keys_N < cut)
    equal = np.flatnonzero(keys_N == cut)[: rows - len(better)]
    return np.sort(np.concatenate([better, equal])).astype(np.int64)


def _check_rows(rule: object, m: int) -> None:
    if not isinstance(m, int) or isinstance(m, bool) or m < 1:
        raise InputError(
            f"{type(rule).__name__}.m is {m!r}; set it to a whole number of rows, at least 1."
        )
