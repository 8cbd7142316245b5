"""The scores of a split's rows (`salt score`), and the rows selected by them (`salt select`).

Scores are columns of N rows in shards; a selection is row_ids.npy, the selected ids int64[m]. Both
have manifest.json and COMPLETED.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from salt_jax.data.row_ids import ROW_IDS_FILE, read_row_ids, write_row_ids
from salt_jax.data.row_passes import RowPass, refuse_other_cache
from salt_jax.data.shard_columns import OLD_SUFFIX, SUFFIX, Column, write_columns
from salt_jax.errors import InputError
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.manifests import (
    begin_writing,
    file_digest,
    json_digest,
    new_manifest,
    read_manifest,
    write_manifest,
)
from salt_jax.storage.restartable_shards import FinishedShards, RestartableShards, Shard

AUDIT_FILE = "audit.json"

# Columns that don't come from the scorer: the row's subset index, and a hash of its tokens.
SUBSET, TARGETS_HASH = "subset", "targets_hash"

_TYPES = ("<u8", "<f4", "<u2")
_NO_COST = types.MappingProxyType({"flops": 0.0, "tokens": 0, "seconds": 0.0})


def targets_hash(targets_L: np.ndarray, segment_ids_L: np.ndarray) -> int:
    """A 64-bit hash of a row's tokens without padding, to find exact duplicates."""
    tokens = np.ascontiguousarray(targets_L[segment_ids_L > 0], "<i4")
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


class RowScoresWriter(RestartableShards):
    """Writes the scores of a split's rows.

    Args:
      folder: The output folder; InputError if another pass was begun there.
      cache_digest: PackedCache.digest of the cache scored.
      split: The split scored.
      rows: N, its rows.
      scorer: The scoring model: path, step, digest.
      ks: The values of k that have columns.
      columns: Names of the scorer's columns, float32.
      own_columns: Names of the other columns.
      shard_rows: Rows per shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        cache_digest: str,
        split: str,
        rows: int,
        scorer: Mapping[str, Any],
        ks: Sequence[int],
        columns: Sequence[str],
        own_columns: Sequence[str] = (),
        shard_rows: int,
    ) -> None:
        names = [*columns, *own_columns]
        for name in own_columns:
            if [TARGETS_HASH, *names, SUBSET].count(name) > 1:
                raise InputError(
                    f"Two columns have the name {name}: give each score one of its own."
                )
        made_from = {"cache": cache_digest, "split": split, "scorer": dict(scorer), "k": list(ks)}
        if own_columns:
            made_from["scores"] = list(own_columns)
        super().__init__(
            folder, rows=rows, shard_rows=shard_rows, suffix=SUFFIX, made_from=made_from
        )
        fields = {TARGETS_HASH: "<u8", **dict.fromkeys(names, "<f4"), SUBSET: "<u2"}
        self._fields = list(fields.items())

    def write(
        self, shard: Shard, columns: Mapping[str, np.ndarray], measured: Mapping[str, Any]
    ) -> None:
        """Writes a shard: its rows of every column, and the measured seconds and workers."""
        nan_n = np.zeros(len(shard.rows), bool)
        for values_n in columns.values():
            if values_n.dtype == np.float32:
                nan_n |= ~(values_n < np.inf)  # −∞ is valid: a row without a learnable token
        with self.writing(shard) as file:
            write_columns(file, columns, np.dtype(self._fields))
            file.finish({"nan_rows": int(nan_n.sum())}, measured)

    def complete(self, cost: Mapping[str, Any] | None = None) -> "RowScores":
        """Completes the folder once every shard is finished, and opens it; see `finish`."""
        if not self.completed:
            self.finish(
                RowScores.kind,
                cost,
                cache_digest=self.made_from["cache"],
                split=self.made_from["split"],
                scorer=self.made_from["scorer"],
                k=self.made_from["k"],
                columns=[list(field) for field in self._fields],
                nan_rows=self.total("nan_rows"),
            )
        return RowScores.open(self.folder)


class RowScores(RowPass):
    """The scores of a split's rows; a shard is compared with its digest when first read.

    The manifest adds scorer {path, step, digest}, k (all values), columns (names and types) and
    nan_rows (rows with non-finite scores).
    """

    kind, called, suffix, made_by = "row_scores", "scores", SUFFIX, "salt score"

    def checked_row_bytes(self) -> int:
        columns = self.manifest["columns"]
        for column in columns:
            if len(column) != 2 or column[1] not in _TYPES:
                raise self.contradiction(
                    f"columns has {column}, expected a name and one of {', '.join(_TYPES)}"
                )
        expected = {TARGETS_HASH, SUBSET}
        if len(dict(columns)) != len(columns) or not expected <= dict(columns).keys():
            raise self.contradiction(f"columns must have {', '.join(sorted(expected))}")
        return sum(np.dtype(dtype).itemsize for _, dtype in columns)

    @property
    def columns(self) -> list[str]:
        """The names of the scorer's columns."""
        names = [name for name, _ in self.manifest["columns"]]
        return [name for name in names if name not in (SUBSET, TARGETS_HASH)]

    def column(self, name: str) -> Column:
        """One column of all rows, read from disk on access."""
        dtype = np.dtype([(each, kind) for each, kind in self.manifest["columns"]])
        return Column(self.shards, dtype, name, may_be_nan=self.manifest["nan_rows"] > 0)

    def scores(
        self,
        column: str,
        learnable_column: str,
        min_learnable_fraction: float = 0.0,
        later: "RowScores | None" = None,
    ) -> "ColumnScores":
        """A column of scores, minus that of a later checkpoint's, if given, with −inf where the
        share of learnable tokens (another column) is below a fraction."""
        learnable = self.column(learnable_column) if min_learnable_fraction > 0 else None
        since = None if later is None else later.column(column)
        return ColumnScores(self.column(column), learnable, min_learnable_fraction, since)

    @functools.cached_property
    def shards(self) -> FinishedShards:
        """The shards' files, which have no .npy headers in format version 2."""
        suffix = SUFFIX if self.manifest["format_version"] > 2 else OLD_SUFFIX
        return FinishedShards(self.folder, self.manifest, suffix, self.made_by)


@dataclasses.dataclass(frozen=True)
class ColumnScores:
    """A Column of scores, minus another, with −inf for rows with too few learnable tokens and for
    those of a mask, bool [N]."""

    column: Column
    learnable: Column | None
    min_learnable_fraction: float
    later: Column | None = None
    left_out: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        scores_n = self.column[rows]
        if self.later is not None:
            with np.errstate(invalid="ignore"):  # −inf of both is NaN, which no rule selects
                scores_n = scores_n - self.later[rows]
        if self.learnable is not None:
            too_few_n = self.learnable[rows] < np.float32(self.min_learnable_fraction)
            scores_n[too_few_n] = -np.inf
        if self.left_out is not None:
            scores_n[self.left_out[rows]] = -np.inf
        return scores_n


def _sum_of(costs: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The costs added up; None if one of them is unknown."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    return {name: sum(cost[name] for cost in known) for name in _NO_COST}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows selected from a split.

    Attributes:
      path: The folder.
      row_ids: int64[m], ascending, distinct.
      manifest: cache_digest, split, rows, scores_digest (None: selected at random), how (the rule
        and its settings), cut (the lowest selected score, or None), scorer and score (of the
        scores), scoring_cost (empty if no scores were needed, None if unknown).
      digest: The manifest's digest, without the cost.
    """

    path: pathlib.Path
    row_ids: np.ndarray
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        row_ids_m: np.ndarray | Iterable[np.ndarray],
        *,
        cache_digest: str,
        split: str,
        how: Mapping[str, Any],
        scores: RowScores | None = None,
        score: Mapping[str, Any] | None = None,
        later: RowScores | None = None,
        cut: float | None = None,
    ) -> Self:
        """Writes the selection and opens it.

        Args:
          folder: The folder; made if needed, other files in it are kept.
          row_ids_m: Ascending, distinct ids, at least one; an array or blocks of arrays.
          cache_digest: PackedCache.digest of the cache they index.
          split: The split they index.
          how: The rule and its settings.
          scores: The scores it was made from; None for a random control.
          score: Which score: k, statistic, unlearnable, min_learnable_fraction.
          later: Scores by a later checkpoint that were subtracted from these.
          cut: The lowest score selected.
        """
        costs = [each.cost for each in (scores, later) if each is not None] or [dict(_NO_COST)]
        path = pathlib.Path(folder)
        begin_writing(path)
        blocks = [row_ids_m] if isinstance(row_ids_m, np.ndarray) else row_ids_m
        rows = write_row_ids(path / ROW_IDS_FILE, blocks)
        manifest = new_manifest(
            "selection",
            cache_digest=cache_digest,
            split=split,
            rows=rows,
            array_digest=file_digest(path / ROW_IDS_FILE),
            how={**how, "later_scores": later.digest[:12]} if later else dict(how),
            scores_digest=scores.digest if scores else None,
            cut=cut,
            scorer=scores.manifest["scorer"] if scores else None,
            score=dict(score) if score else None,
            scoring_cost=_sum_of(costs),
        )
        write_manifest(path, manifest)
        return cls.open(path)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None) -> Self:
        """Opens a finished selection; see `RowPass.open`."""
        path = local_folder(folder)
        manifest = read_manifest(path, "selection")
        refuse_other_cache(path, "selection", manifest, cache_digest)
        row_ids_m = read_row_ids(path, manifest["rows"], manifest["array_digest"], "salt select")
        selected = {name: part for name, part in manifest.items() if name != "scoring_cost"}
        return cls(path, row_ids_m, manifest, json_digest(selected))

    def require_within(self, rows: int) -> None:
        """Refuses a selection with ids beyond a split of `rows` rows."""
        if self.row_ids[-1] >= rows:
            raise InputError(
                f"{self.path} selects row {self.row_ids[-1]} of a split of {rows} rows: copy "
                "the folder again, or run its `salt select` again."
            )
