"""The rows of a packed cache with their scores, as SeqIO tasks for T5X and any other SeqIO user:
all of them, or those selected (SALT_DS).

In: a packed cache, its scores, and perhaps a selection. Out: a registered task, one example a row:

    targets      int32[…]   the row's tokens, padding left off (feature converters pad as they need)
    slm_score    float32    the score, in nats; −inf or NaN for none
    row_id       int64      the row's index in its split
    subset       int64      index of its subset's name

SeqIO has no place for a row's own loss weights: there every token is trained on, the row's first
one included.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from salt_jax.data.packed_cache import SPLITS, PackedCache, PackedSplit
from salt_jax.data.row_scores import RowScores, Scores, Selection
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.t5x.quiet_tensorflow import seqio, tf
from salt_jax.t5x.seqio_adapters import SeqIOVocabulary, SubsetVocabulary

_BLOCK_ROWS = 64
_LARGEST_ROW_ID = 2**31 - 1


class RowSource(Protocol):
    """Rows of a packed cache to make a task of."""

    def vocabulary(self) -> Vocabulary:
        """The cache's vocabulary."""
        ...

    def subset_names(self) -> tuple[str, ...]:
        """The cache's subsets."""
        ...

    def dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        """The rows, by ascending row id or in an order shuffled whole by `seed`."""
        ...


@dataclasses.dataclass(frozen=True)
class ScoredRows:
    """Where all rows and their scores lie; nothing is read until it is asked for.

    Attributes:
      cache: Folder of the packed cache.
      scores: Folder of its scores.
      score: Which of them.
    """

    cache: str
    scores: str
    score: ScoreConfig = ScoreConfig()  # noqa: RUF009 (frozen)

    @functools.cached_property
    def opened(self) -> tuple[PackedCache, RowScores, Scores]:
        """The cache, its scores, and that of every row.

        Raises:
          InputError: One of them is missing, half-written, or of another cache than `cache`; or the
            scores hold several k and none is chosen.
        """
        cache = PackedCache.open(self.cache)
        scores = RowScores.open(self.scores, cache_digest=cache.digest)
        return cache, scores, _of_each_row(scores, self.score)

    def vocabulary(self) -> Vocabulary:
        return self.opened[0].vocabulary

    def subset_names(self) -> tuple[str, ...]:
        return self.opened[0].subsets

    def dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        """All rows.

        Raises:
          InputError: See `opened`; or another split than the one scored.
        """
        cache, scores, scores_N = self.opened
        _require_split(split, "scores", self.scores, scores.manifest["split"])
        rows = cache.split(split)
        return _dataset(rows, range(len(rows)), scores_N, shuffle_files, seed)


@dataclasses.dataclass(frozen=True)
class SelectedRows:
    """Where the rows, their selection and their scores lie; nothing is read until it is asked for.

    Attributes:
      cache: Folder of the packed cache.
      selection: Folder of the selection.
      scores: Folder of the scores that the selection was made from, for a random control any of
        the cache; "" for none.
      score: Which of them, for a random control; a selection by score has its own.
    """

    cache: str
    selection: str
    scores: str = ""
    score: ScoreConfig = ScoreConfig()  # noqa: RUF009 (frozen)

    @functools.cached_property
    def opened(self) -> tuple[PackedCache, Selection, Scores | None]:
        """The cache, the selection, and the score of every row.

        Raises:
          InputError: One of them is missing, half-written, or of another cache than `cache`; or
            the selection was made from other scores.
        """
        cache = PackedCache.open(self.cache)
        selection = Selection.open(self.selection, cache_digest=cache.digest)
        if not self.scores:
            return cache, selection, None
        scores = RowScores.open(self.scores, cache_digest=cache.digest)
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
        selected_by = selection.manifest["score"]
        score = ScoreConfig(**selected_by) if selected_by else self.score
        return cache, selection, _of_each_row(scores, score)

    def vocabulary(self) -> Vocabulary:
        return self.opened[0].vocabulary

    def subset_names(self) -> tuple[str, ...]:
        return self.opened[0].subsets

    def dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        """The selected rows.

        Raises:
          InputError: See `opened`; or another split than the one selected from.
        """
        cache, selection, scores_N = self.opened
        _require_split(split, "selection", self.selection, selection.manifest["split"])
        return _dataset(cache.split(split), selection.row_ids, scores_N, shuffle_files, seed)


def register_scored_rows(name: str, cache: str, scores: str, **score: Any) -> seqio.Task:
    """Registers all rows of a split with their scores; the folders are read when it is used.

    Args:
      name: The task's name.
      cache: Folder of the packed cache (`salt prepare`).
      scores: Folder of the scores (`salt score`).
      score: Settings of ScoreConfig: which of the scores.
    """
    return register_rows(name, lambda: ScoredRows(cache, scores, ScoreConfig(**score)))


def register_salt_ds(name: str, cache: str, selection: str, scores: str = "") -> seqio.Task:
    """Registers the selected rows as a SeqIO task; the folders are read when it is used.

    Args:
      name: The task's name.
      cache: Folder of the packed cache (`salt prepare`).
      selection: Folder of the selection (`salt select`).
      scores: Folder of the scores (`salt score`); "" leaves `slm_score` out.
    """
    return register_rows(name, lambda: SelectedRows(cache, selection, scores))


def register_rows(name: str, find: Callable[[], RowSource]) -> seqio.Task:
    """The same for folders that `find` names when the task is first used."""
    found = functools.cache(find)
    passed_on = {"add_eos": False, "dtype": tf.int64, "rank": 0}
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: found().dataset(split, shuffle_files, seed),
            splits=SPLITS,
        ),
        output_features={
            "targets": seqio.Feature(SeqIOVocabulary(lambda: found().vocabulary()), add_eos=False),
            "slm_score": seqio.ContinuousFeature(dtype=tf.float32, rank=0, required=False),
            "row_id": seqio.Feature(seqio.PassThroughVocabulary(_LARGEST_ROW_ID), **passed_on),
            "subset": seqio.Feature(SubsetVocabulary(lambda: found().subset_names()), **passed_on),
        },
        preprocessors=[],
    )


def _of_each_row(scores: RowScores, score: ScoreConfig) -> Scores:
    score = score.among(scores.manifest["k"], scores.columns)
    return scores.scores(score.column, score.learnable_column, score.min_learnable_fraction)


def _require_split(asked: str, what: str, folder: str, split: str) -> None:
    if asked != split:
        raise InputError(
            f"The {what} in {folder} are of the {split} split, not of {asked}: ask for that split."
        )


def _dataset(
    rows: PackedSplit,
    row_ids_m: np.ndarray | range,
    scores_N: Scores | None,
    shuffle: bool,
    seed: int | None,
) -> tf.data.Dataset:
    """One example a row, by ascending row id or in an order shuffled whole by `seed`."""
    order: Any = range(len(row_ids_m))
    if shuffle:
        # An order that is computed place by place: all ids of the Pile would take gigabytes.
        seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        order = grain.MapDataset.range(len(row_ids_m)).shuffle(seed=seed)

    def examples() -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(row_ids_m), _BLOCK_ROWS):
            places = range(start, min(start + _BLOCK_ROWS, len(row_ids_m)))
            ids = np.array([row_ids_m[order[place]] for place in places], np.int64)
            scores_n = None if scores_N is None else scores_N[ids]
            for number, row in enumerate(rows.__getitems__(ids.tolist())):
                example = {
                    "targets": row["targets"][row["segment_ids"] > 0],
                    "row_id": row["row_id"],
                    "subset": row["subset"].astype(np.int64),
                }
                if scores_n is not None:
                    example["slm_score"] = scores_n[number]
                yield example

    signature = {
        "targets": tf.TensorSpec((None,), tf.int32),
        "row_id": tf.TensorSpec((), tf.int64),
        "subset": tf.TensorSpec((), tf.int64),
    }
    if scores_N is not None:
        signature["slm_score"] = tf.TensorSpec((), tf.float32)
    return tf.data.Dataset.from_generator(examples, output_signature=signature)
