"""One score a row, and the rows picked by it: what `salt score` and `salt select` leave.

In: scores float32[N] of a split's N rows, or the ids int64[m] of the rows selected. Out: a folder
of scores.npy or row_ids.npy, manifest.json and COMPLETED. Both name the cache they belong to by its
digest; another cache is refused.
"""

import dataclasses
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from salt_jax.data.manifests import (
    begin_writing,
    file_digest,
    local_folder,
    manifest_digest,
    new_manifest,
    read_manifest,
    write_manifest,
)
from salt_jax.errors import InputError

SCORES_FILE = "scores.npy"
ROW_IDS_FILE = "row_ids.npy"

_NO_COST = types.MappingProxyType({"flops": 0.0, "tokens": 0, "seconds": 0.0})


@dataclasses.dataclass(frozen=True)
class RowScores:
    """Scores of a split's rows.

    Attributes:
      path: The folder.
      scores: float32[N], the score of row i at index i, in nats; −inf is a row never to be
        selected.
      manifest: cache_digest, split, rows, scorer {path, step, digest},
        score {k, unlearnable, min_learnable_fraction}, cost {flops, tokens, seconds} or None where
        it is not known.
      digest: What a selection names it by: the manifest's, which holds the digest of the scores;
        without the cost, whose seconds are never the same twice.
    """

    path: pathlib.Path
    scores: np.ndarray
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        scores_N: np.ndarray,
        *,
        cache_digest: str,
        split: str,
        scorer: Mapping[str, Any],
        score: Mapping[str, Any],
        cost: Mapping[str, Any] | None = None,
    ) -> "RowScores":
        """Writes the scores and opens what was written.

        Args:
          folder: The folder; made if need be, other files in it are left alone.
          scores_N: One score for every row of the split, by row id.
          cache_digest: PackedCache.digest of the cache scored.
          split: The split scored.
          scorer: The scoring model: path, step, digest.
          score: How the score is defined: k, unlearnable, min_learnable_fraction.
          cost: What scoring took: FLOPs, tokens, seconds.
        """
        assert np.ndim(scores_N) == 1, f"scores of shape {np.shape(scores_N)}, expected [N]"
        path = local_folder(folder)
        begin_writing(path)
        _write_array(path / SCORES_FILE, np.asarray(scores_N, np.float32))
        manifest = new_manifest(
            "row_scores",
            cache_digest=cache_digest,
            split=split,
            rows=len(scores_N),
            array_digest=file_digest(path / SCORES_FILE),
            scorer=dict(scorer),
            score=dict(score),
            cost=dict(cost) if cost else None,
        )
        write_manifest(path, manifest)
        return cls.open(path)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None
    ) -> "RowScores":
        """Opens a finished folder of scores; the scores stay on disk until read.

        Args:
          folder: A folder written by `salt score`.
          cache_digest: The cache they must belong to; None takes any.

        Raises:
          InputError: Not there, half-written, cut short, changed, or of another cache.
        """
        manifest = read_manifest(folder, "row_scores")
        path = pathlib.Path(folder)
        _check_cache(path, "scores", manifest, cache_digest)
        scores_N = _read_array(path / SCORES_FILE, manifest, np.float32, "salt score")
        return cls(path, scores_N, manifest, _digest(manifest))


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
        row_ids_m: np.ndarray,
        *,
        cache_digest: str,
        split: str,
        how: Mapping[str, Any],
        scores: RowScores | None = None,
    ) -> "Selection":
        """Writes the selection and opens what was written.

        Args:
          folder: The folder; made if need be, other files in it are left alone.
          row_ids_m: Ascending ids, each once, at least one.
          cache_digest: PackedCache.digest of the cache they index.
          split: The split they index.
          how: The rule and its settings, as told to a reader of the manifest.
          scores: The scores it was made from; None for a random control.
        """
        ids_m = np.asarray(row_ids_m, np.int64)
        assert ids_m.ndim == 1, f"a selection of shape {ids_m.shape}, expected [m]"
        assert len(ids_m), "a selection of no rows"
        assert np.all(np.diff(ids_m, prepend=-1) > 0), "row ids must ascend, each once"
        path = local_folder(folder)
        begin_writing(path)
        _write_array(path / ROW_IDS_FILE, ids_m)
        manifest = new_manifest(
            "selection",
            cache_digest=cache_digest,
            split=split,
            rows=len(ids_m),
            array_digest=file_digest(path / ROW_IDS_FILE),
            how=dict(how),
            scores_digest=scores.digest if scores else None,
            cut=float(scores.scores[ids_m].min()) if scores else None,
            scorer=scores.manifest["scorer"] if scores else None,
            score=scores.manifest["score"] if scores else None,
            scoring_cost=scores.manifest.get("cost") if scores else dict(_NO_COST),
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
        manifest = read_manifest(folder, "selection")
        path = pathlib.Path(folder)
        _check_cache(path, "selection", manifest, cache_digest)
        row_ids_m = _read_array(path / ROW_IDS_FILE, manifest, np.int64, "salt select")
        return cls(path, row_ids_m, manifest, _digest(manifest))


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of what was made, not of what it took to make it."""
    costs = ("cost", "scoring_cost")
    return manifest_digest({name: part for name, part in manifest.items() if name not in costs})


def _check_cache(
    path: pathlib.Path, what: str, manifest: Mapping[str, Any], cache_digest: str | None
) -> None:
    if cache_digest is not None and manifest["cache_digest"] != cache_digest:
        raise InputError(
            f"The {what} in {path} belong to the cache {manifest['cache_digest'][:12]}…, "
            f"expected the cache {cache_digest[:12]}…: name the cache they were made from, "
            "or make them again from this one."
        )


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_array(
    path: pathlib.Path, manifest: Mapping[str, Any], dtype: type[np.generic], made_by: str
) -> np.ndarray:
    """The array, mapped from disk, after a check of its type, its length and its digest."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): copy the folder again, or run its `{made_by}` again."
        ) from error
    rows = manifest["rows"]
    if array.dtype != dtype or array.shape != (rows,):
        raise InputError(
            f"{path} holds {array.dtype}{list(array.shape)}, its manifest says "
            f"{np.dtype(dtype)}[{rows}]: copy the folder again, or run its `{made_by}` again."
        )
    digest = file_digest(path)
    if digest != manifest["array_digest"]:
        raise InputError(
            f"{path} has the digest {digest[:12]}…, its manifest says "
            f"{manifest['array_digest'][:12]}…: copy the folder again, or run its `{made_by}` "
            "again."
        )
    return array
