"""What is known of each row, and the rows picked by it: what `salt score` and `salt select` leave.

In: columns of a split's N rows, shard by shard, or the ids int64[m] of the rows selected. Out: a
folder of shards/ or row_ids.npy, manifest.json and COMPLETED. Both name the cache they belong to by
its digest; another cache is refused.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.data.row_ids import ROW_IDS_FILE, read_row_ids, write_row_ids
from salt_jax.data.shard_columns import OLD_SUFFIX, SUFFIX, Column, write_columns
from salt_jax.errors import InputError
from salt_jax.storage import durable_files
from salt_jax.storage.json_files import read_json_object, require_shape
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.manifests import (
    COST,
    MANIFEST_FILE,
    begin_writing,
    file_digest,
    json_digest,
    new_manifest,
    read_manifest,
    write_manifest,
)
from salt_jax.storage.restartable_shards import FinishedShards, RestartableShards, Shard

AUDIT_FILE = "audit.json"
COST_FILE = "cost.json"

# Columns beside the scorer's: the index of the row's subset, and a hash of its tokens.
SUBSET, TARGETS_HASH = "subset", "targets_hash"

_TYPES = ("<u8", "<f4", "<u2")
_AGAIN = "copy the folder again, or run its `salt score` again"
_NO_COST = types.MappingProxyType({"flops": 0.0, "tokens": 0, "seconds": 0.0})


def targets_hash(targets_L: np.ndarray, segment_ids_L: np.ndarray) -> int:
    """64 bits of a row's tokens, padding left out: equal for exact duplicates, else different."""
    tokens = np.ascontiguousarray(targets_L[segment_ids_L > 0], "<i4")
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


class RowScoresWriter:
    """Scores of a split's rows in the making, by one worker of perhaps several.

    Args:
      folder: Where they will lie; a folder that holds the same scores begun is gone on with.
      cache_digest: PackedCache.digest of the cache scored.
      split: The split scored.
      rows: N, its rows.
      scorer: The scoring model: path, step, digest.
      ks: Every k that there are columns for.
      columns: Names of their columns, float32.
      own_columns: Names of those beside them.
      shard_rows: Rows of a shard.

    Raises:
      InputError: The folder was begun with something else, or two columns have one name.
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
        self.shards = RestartableShards.of(
            folder, rows=rows, shard_rows=shard_rows, suffix=SUFFIX, made_from=made_from
        )
        fields = {TARGETS_HASH: "<u8", **dict.fromkeys(names, "<f4"), SUBSET: "<u2"}
        self._fields = list(fields.items())

    def begin(self) -> None:
        """Makes the folder, if need be.

        Raises:
          InputError: Another pass was begun here in the meantime.
        """
        self.shards = self.shards.begin()

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
        """Completes the folder, every shard of which is finished, and opens it.

        Args:
          cost: The pass's FLOPs and tokens; its seconds are those that the shards took, as if the
            workers had shared them evenly and worked at the same time.
        """
        shards = self.shards
        if not shards.completed:
            if cost:
                each = (one["seconds"] / one["workers"] for one in shards.measured())
                text = json.dumps({**cost, "seconds": sum(each)}) + "\n"
                durable_files.write_text(shards.folder / COST_FILE, text)
            made_from = shards.made_from
            shards.complete(
                "row_scores",
                cache_digest=made_from["cache"],
                split=made_from["split"],
                scorer=made_from["scorer"],
                k=made_from["k"],
                columns=[list(field) for field in self._fields],
                nan_rows=shards.total("nan_rows"),
            )
        return RowScores.open(shards.folder)


@dataclasses.dataclass(frozen=True)
class RowScores:
    """What a scorer says of a split's rows.

    Attributes:
      path: The folder.
      manifest: cache_digest, split, rows, scorer {path, step, digest}, k (all of them), columns
        (names and types), nan_rows (where the scorer was broken), shard_rows, shards.
      digest: What a selection names it by: the manifest's, which holds the digests of the shards.
    """

    path: pathlib.Path
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None
    ) -> "RowScores":
        """Opens a finished folder of scores; a shard is compared with its digest when it is read.

        Args:
          folder: A folder written by `salt score`.
          cache_digest: The cache they must belong to; None takes any.

        Raises:
          InputError: Not there, half-written, a shard missing or cut short, or of another cache.
        """
        path = local_folder(folder)
        manifest = read_manifest(path, "row_scores")
        _check_cache(path, "scores", manifest, cache_digest)
        scores = cls(path, manifest, json_digest(manifest))
        _require_layout(path / MANIFEST_FILE, manifest)
        _ = scores._shards  # which looks at every file
        return scores

    @property
    def rows(self) -> int:
        """N."""
        return self.manifest["rows"]

    @property
    def columns(self) -> list[str]:
        """The names of the scorer's columns."""
        names = [name for name, _ in self.manifest["columns"]]
        return [name for name in names if name not in (SUBSET, TARGETS_HASH)]

    @property
    def cost(self) -> dict[str, Any] | None:
        """What scoring took: flops, tokens, seconds; None where it is not known."""
        path = self.path / COST_FILE
        if not path.exists():
            return None
        cost = read_json_object(path, _AGAIN)
        require_shape(path, cost, COST, _AGAIN)
        return cost

    def column(self, name: str) -> Column:
        """One column of all rows, on disk until it is read."""
        dtype = np.dtype([(each, kind) for each, kind in self.manifest["columns"]])
        return Column(self._shards, dtype, name, may_be_nan=self.manifest["nan_rows"] > 0)

    def scores(
        self, column: str, learnable_column: str, min_learnable_fraction: float = 0.0
    ) -> "Scores":
        """The score of every row.

        Args:
          column: Where it is.
          learnable_column: Where the share of learnable tokens is.
          min_learnable_fraction: Rows with a smaller share score −inf.
        """
        learnable = self.column(learnable_column) if min_learnable_fraction > 0 else None
        return Scores(self.column(column), learnable, min_learnable_fraction)

    @functools.cached_property
    def _shards(self) -> FinishedShards:
        suffix = SUFFIX if self.manifest["format_version"] > 2 else OLD_SUFFIX
        return FinishedShards(self.path, self.manifest, suffix, "salt score")


@dataclasses.dataclass(frozen=True)
class Scores:
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
    """Rows picked from a split.

    Attributes:
      path: The folder.
      row_ids: int64[m], ascending, each once.
      manifest: cache_digest, split, rows, scores_digest (None: picked at random), how (the rule
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
    ) -> "Selection":
        """Writes the selection and opens what was written.

        Args:
          folder: The folder; made if need be, other files in it are left alone.
          row_ids_m: Ascending ids, each once, at least one; an array, or one after another.
          cache_digest: PackedCache.digest of the cache they index.
          split: The split they index.
          how: The rule and its settings, as told to a reader of the manifest.
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
    def open(
        cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None
    ) -> "Selection":
        """Opens a finished selection.

        Args:
          folder: A folder written by `salt select`.
          cache_digest: The cache it must belong to; None takes any.

        Raises:
          InputError: Not there, half-written, cut short, changed, or of another cache.
        """
        path = local_folder(folder)
        manifest = read_manifest(path, "selection")
        _check_cache(path, "selection", manifest, cache_digest)
        row_ids_m = read_row_ids(path, manifest["rows"], manifest["array_digest"], "salt select")
        return cls(path, row_ids_m, manifest, _digest(manifest))

    def require_within(self, rows: int) -> None:
        """Refuses a selection that has rows which a split of so many hasn't.

        Raises:
          InputError: With the row.
        """
        if self.row_ids[-1] >= rows:
            raise InputError(
                f"{self.path} selects the row {self.row_ids[-1]} of a split of {rows} rows: copy "
                "the folder again, or run its `salt select` again."
            )


def _require_layout(file: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Refuses columns of other types, and shards that can't hold them."""
    columns, row_bytes = manifest["columns"], 0
    for column in columns:
        if len(column) != 2 or column[1] not in _TYPES:
            raise InputError(
                f"{file}: columns has {column}, expected a name and one of {', '.join(_TYPES)}: "
                f"{_AGAIN}."
            )
        row_bytes += np.dtype(column[1]).itemsize
    expected = {TARGETS_HASH, SUBSET}
    if len(dict(columns)) != len(columns) or not expected <= dict(columns).keys():
        raise InputError(f"{file}: columns must have {', '.join(sorted(expected))}: {_AGAIN}.")
    for shard in manifest["shards"]:
        if shard["bytes"] < shard["rows"] * row_bytes:
            raise InputError(
                f"{file}: a shard of {shard['rows']} rows has {shard['bytes']} bytes, expected "
                f"{row_bytes} a row: {_AGAIN}."
            )


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of what was selected, not of what it took to score it."""
    return json_digest({name: part for name, part in manifest.items() if name != "scoring_cost"})


def _check_cache(
    path: pathlib.Path, what: str, manifest: Mapping[str, Any], cache_digest: str | None
) -> None:
    if cache_digest is not None and manifest["cache_digest"] != cache_digest:
        raise InputError(
            f"The {what} in {path} belong to the cache {manifest['cache_digest'][:12]}…, "
            f"expected the cache {cache_digest[:12]}…: name the cache they were made from, "
            "or make them again from this one."
        )
