"""The scores of a split's rows, and the rows selected by them.

`salt score` leaves columns of N rows in shards, `salt select` row_ids.npy with the ids int64[m] of
the rows selected; each with manifest.json and COMPLETED.
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
from salt_jax.data.row_passes import PassWriter, RowPass, refuse_other_cache
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

# Columns beside the scorer's: the index of the row's subset, and a hash of its tokens.
SUBSET, TARGETS_HASH = "subset", "targets_hash"

_TYPES = ("<u8", "<f4", "<u2")
_NO_COST = types.MappingProxyType({"flops": 0.0, "tokens": 0, "seconds": 0.0})


def targets_hash(targets_L: np.ndarray, segment_ids_L: np.ndarray) -> int:
    """64 bits of a row's tokens, padding left out: equal for exact duplicates, else different."""
    tokens = np.ascontiguousarray(targets_L[segment_ids_L > 0], "<i4")
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


class RowScoresWriter(PassWriter):
    """Scores of a split's rows in the making.

    Args:
      folder: Where they will lie; an InputError if it was begun with something else.
      cache_digest: PackedCache.digest of the cache scored.
      split: The split scored.
      rows: N, its rows.
      scorer: The scoring model: path, step, digest.
      ks: Every k that there are columns for.
      columns: Names of their columns, float32.
      own_columns: Names of those beside them.
      shard_rows: Rows of a shard.
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
            RestartableShards.of(
                folder, rows=rows, shard_rows=shard_rows, suffix=SUFFIX, made_from=made_from
            )
        )
        fields = {TARGETS_HASH: "<u8", **dict.fromkeys(names, "<f4"), SUBSET: "<u2"}
        self._fields = list(fields.items())

    def write(
        self, shard: Shard, columns: Mapping[str, np.ndarray], measured: Mapping[str, Any]
    ) -> None:
        """Writes a shard.

        Args:
          shard: Which.
          columns: Its rows' part of every column.
          measured: seconds; workers, among which the pass is divided.
        """
        nan_n = np.zeros(len(shard.rows), bool)
        for values_n in columns.values():
            if values_n.dtype == np.float32:
                nan_n |= ~(values_n < np.inf)  # −∞ is the score of a row without a learnable token
        with self.shards.write(shard) as file:
            write_columns(file, columns, np.dtype(self._fields))
            file.finish({"nan_rows": int(nan_n.sum())}, measured)

    def complete(self, cost: Mapping[str, Any] | None = None) -> "RowScores":
        """Completes the folder, every shard of which is finished, and opens it; see `finish`."""
        if not self.shards.completed:
            made_from = self.shards.made_from
            self.finish(
                RowScores.kind,
                cost,
                scorer=made_from["scorer"],
                k=made_from["k"],
                columns=[list(field) for field in self._fields],
                nan_rows=self.shards.total("nan_rows"),
            )
        return RowScores.open(self.shards.folder)


class RowScores(RowPass):
    """What a scorer says of a split's rows; a shard is compared with its digest when it is read.

    Its manifest adds scorer {path, step, digest}, k (all of them), columns (names and types) and
    nan_rows (where the scorer was broken).
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
        """One column of all rows, on disk until it is read."""
        dtype = np.dtype([(each, kind) for each, kind in self.manifest["columns"]])
        return Column(self.shards, dtype, name, may_be_nan=self.manifest["nan_rows"] > 0)

    def scores(
        self, column: str, learnable_column: str, min_learnable_fraction: float = 0.0
    ) -> "ColumnScores":
        """The score of every row: a column, with −inf where another, the share of learnable tokens,
        is below a fraction."""
        learnable = self.column(learnable_column) if min_learnable_fraction > 0 else None
        return ColumnScores(self.column(column), learnable, min_learnable_fraction)

    @functools.cached_property
    def shards(self) -> FinishedShards:
        """The shards' files, which format version 2 laid down without .npy headers."""
        suffix = SUFFIX if self.manifest["format_version"] > 2 else OLD_SUFFIX
        return FinishedShards(self.path, self.manifest, suffix, self.made_by)


@dataclasses.dataclass(frozen=True)
class ColumnScores:
    """A column of scores, read as a Column is, with −inf where too few tokens are learnable."""

    column: Column
    learnable: Column | None
    min_learnable_fraction: float

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        scores_n = self.column[rows]
        if self.learnable is not None:
            too_few_n = self.learnable[rows] < np.float32(self.min_learnable_fraction)
            scores_n[too_few_n] = -np.inf
        return scores_n


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows selected from a split.

    Attributes:
      path: The folder.
      row_ids: int64[m], ascending, each once.
      manifest: cache_digest, split, rows, scores_digest (None: selected at random), how (the rule
        and its settings), cut (the lowest selected score, or None), scorer and score (of the
        scores), scoring_cost (nothing where no scores were needed, None where it is not known).
      digest: The manifest's, without the cost.
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
        cut: float | None = None,
    ) -> Self:
        """Writes the selection and opens what was written.

        Args:
          folder: The folder; made if need be, other files in it are left alone.
          row_ids_m: Ascending ids, each once, at least one; an array, or one after another.
          cache_digest: PackedCache.digest of the cache they index.
          split: The split they index.
          how: The rule and its settings.
          scores: The scores it was made from; None for a random control.
          score: Which of them: k, statistic, unlearnable, min_learnable_fraction.
          cut: The lowest score selected.
        """
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
            how=dict(how),
            scores_digest=scores.digest if scores else None,
            cut=cut,
            scorer=scores.manifest["scorer"] if scores else None,
            score=dict(score) if score else None,
            scoring_cost=scores.cost if scores else dict(_NO_COST),
        )
        write_manifest(path, manifest)
        return cls.open(path)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None) -> Self:
        """Opens a finished selection, and reads its ids; see `RowPass.open`."""
        path = local_folder(folder)
        manifest = read_manifest(path, "selection")
        refuse_other_cache(path, "selection", manifest, cache_digest)
        row_ids_m = read_row_ids(path, manifest["rows"], manifest["array_digest"], "salt select")
        selected = {name: part for name, part in manifest.items() if name != "scoring_cost"}
        return cls(path, row_ids_m, manifest, json_digest(selected))

    def require_within(self, rows: int) -> None:
        """Refuses a selection with rows that a split of so many doesn't have."""
        if self.row_ids[-1] >= rows:
            raise InputError(
                f"{self.path} selects the row {self.row_ids[-1]} of a split of {rows} rows: copy "
                "the folder again, or run its `salt select` again."
            )
