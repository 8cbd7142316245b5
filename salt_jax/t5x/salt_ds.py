"""SeqIO tasks over the rows of a packed cache: all rows with their scores, or selected ones
(SALT_DS).

One example per row:

    targets      int32[…]   the row's tokens without padding (feature converters pad as they need)
    slm_score    float32    the score, in nats; −inf or NaN for none
    row_id       int64      the row's index in its split
    subset       int64      index of its subset's name

SeqIO has no feature for a row's loss weights: every token is trained on, the row's first included.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from salt_jax.data.packed_cache import SPLITS, PackedCache
from salt_jax.data.row_scores import ColumnScores, RowScores, Selection
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.t5x.quiet_tensorflow import seqio, tf
from salt_jax.t5x.seqio_adapters import SeqIOVocabulary, SubsetVocabulary

_BLOCK_ROWS = 64
_LARGEST_ROW_ID = 2**31 - 1


class _Opened(NamedTuple):
    """A task's opened cache, the split and ascending ids of its rows, and the scores of all rows of
    the split, if any."""

    cache: PackedCache
    split: str
    row_ids: Sequence[int] | np.ndarray
    scores: ColumnScores | None


@dataclasses.dataclass(frozen=True)
class CacheRows:
    """Rows of a packed cache, opened lazily.

    Attributes:
      cache: Folder of the packed cache.
      selection: Folder of the selection; "" for all rows.
      scores: Folder of the scores: those that the selection was made from, or for a random control
        or all rows any of the cache; "" leaves `slm_score` out.
      score: Which score to read, for rows that were not selected by score.
    """

    cache: str
    selection: str = ""
    scores: str = ""
    score: ScoreConfig = ScoreConfig()  # noqa: RUF009 (frozen)

    @functools.cached_property
    def opened(self) -> _Opened:
        """The folders, opened; InputError if one is missing, incomplete or of another cache, the
        selection was made from other scores, or the scores have several k and none is chosen."""
        cache, score = PackedCache.open(self.cache), self.score
        scores = RowScores.open(self.scores, cache_digest=cache.digest) if self.scores else None
        if not self.selection:
            assert scores is not None, "all rows are registered for their scores"
            split = scores.manifest["split"]
            row_ids: range | np.ndarray = range(len(cache.split(split)))
        else:
            selection = Selection.open(self.selection, cache_digest=cache.digest)
            split, row_ids = selection.manifest["split"], selection.row_ids
            if scores is not None:
                self._require_own(scores, selection)
            if selected_by := selection.manifest["score"]:
                score = ScoreConfig(**selected_by)
        if scores is None:
            return _Opened(cache, split, row_ids, None)
        score = score.among(scores.manifest["k"], scores.columns)
        scores_N = scores.scores(score.column, score.learnable_column, score.min_learnable_fraction)
        return _Opened(cache, split, row_ids, scores_N)

    def _require_own(self, scores: RowScores, selection: Selection) -> None:
        """Refuses scores that the selection was not made from."""
        if scores.manifest["split"] != selection.manifest["split"]:
            raise InputError(
                f"The scores in {self.scores} are of the {scores.manifest['split']} split, the "
                f"selection in {self.selection} of {selection.manifest['split']}: name the scores "
                "that the selection was made from."
            )
        made_from = selection.manifest["scores_digest"]
        if made_from is not None and made_from != scores.digest:
            raise InputError(
                f"The selection in {self.selection} was made from the scores {made_from[:12]}…, "
                f"{self.scores} holds the scores {scores.digest[:12]}…: name the scores that the "
                "selection was made from."
            )

    def dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        """The rows, by ascending row id or globally shuffled by `seed`; InputError as `opened`, or
        for a split other than the one scored or selected from."""
        cache, own_split, row_ids, scores_N = self.opened
        if split != own_split:
            what = "selection" if self.selection else "scores"
            raise InputError(
                f"The {what} in {self.selection or self.scores} are of the {own_split} split, not "
                f"of {split}: ask for that split."
            )
        rows = cache.split(split)
        order: Any = range(len(row_ids))
        if shuffle_files:
            # The order is computed element by element: all ids of the Pile would take gigabytes.
            seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
            order = grain.MapDataset.range(len(row_ids)).shuffle(seed=seed)

        def examples() -> Iterator[Mapping[str, Any]]:
            for start in range(0, len(row_ids), _BLOCK_ROWS):
                places = range(start, min(start + _BLOCK_ROWS, len(row_ids)))
                ids = np.array([row_ids[order[place]] for place in places], np.int64)
                scored = {} if scores_N is None else {"slm_score": scores_N[ids]}
                for number, row in enumerate(rows.__getitems__(ids.tolist())):
                    yield {
                        "targets": row["targets"][row["segment_ids"] > 0],
                        "row_id": row["row_id"],
                        "subset": row["subset"].astype(np.int64),
                        **{name: scores_n[number] for name, scores_n in scored.items()},
                    }

        signature = {
            "targets": tf.TensorSpec((None,), tf.int32),
            "row_id": tf.TensorSpec((), tf.int64),
            "subset": tf.TensorSpec((), tf.int64),
        }
        if scores_N is not None:
            signature["slm_score"] = tf.TensorSpec((), tf.float32)
        return tf.data.Dataset.from_generator(examples, output_signature=signature)


def register_scored_rows(name: str, cache: str, scores: str, **score: Any) -> seqio.Task:
    """Registers a task of all rows of a split with their scores, from the folders of `salt prepare`
    and `salt score`; `score` are settings of ScoreConfig. Folders are read when the task is."""
    return register_rows(name, lambda: CacheRows(cache, "", scores, ScoreConfig(**score)))


def register_salt_ds(name: str, cache: str, selection: str, scores: str = "") -> seqio.Task:
    """Registers a task of selected rows, from the folders of `salt prepare`, `salt select` and
    `salt score` ("" leaves `slm_score` out). Folders are read when the task is."""
    return register_rows(name, lambda: CacheRows(cache, selection, scores))


def register_rows(name: str, find: Callable[[], CacheRows]) -> seqio.Task:
    """Registers a task of the rows that `find` returns when the task is first used."""
    found = functools.cache(find)
    passed_on = {"add_eos": False, "dtype": tf.int64, "rank": 0}
    vocabulary = SeqIOVocabulary(lambda: found().opened.cache.vocabulary)
    subsets = SubsetVocabulary(lambda: found().opened.cache.subsets)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: found().dataset(split, shuffle_files, seed),
            splits=SPLITS,
        ),
        output_features={
            "targets": seqio.Feature(vocabulary, add_eos=False),
            "slm_score": seqio.ContinuousFeature(dtype=tf.float32, rank=0, required=False),
            "row_id": seqio.Feature(seqio.PassThroughVocabulary(_LARGEST_ROW_ID), **passed_on),
            "subset": seqio.Feature(subsets, **passed_on),
        },
        preprocessors=[],
    )
