"""The selected rows of a packed cache, with their scores, as a SeqIO task: SALT_DS for T5X and any
other SeqIO user.

In: a packed cache, a selection and its scores. Out: a registered task, one example a selected row:

    targets      int32[…]   the row's tokens, padding left off (feature converters pad as they need)
    slm_score    float32    the score, in nats
    row_id       int64      the row's index in its split
    subset       int64      index of its subset's name

SeqIO has no place for a row's own loss weights: there every token is trained on, the row's first
one included.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from salt_jax.data.packed_cache import SPLITS, PackedCache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.quiet_tensorflow import seqio, tf
from salt_jax.preparation.seqio_adapters import SeqIOVocabulary, SubsetVocabulary

_BLOCK_ROWS = 64
_LARGEST_ROW_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class SelectedRows:
    """Where the rows, their selection and their scores lie; nothing is read until it is asked for.

    Attributes:
      cache: Folder of the packed cache.
      selection: Folder of the selection.
      scores: Folder of the scores that the selection was made from, for a random control any of
        the cache; "" for none.
    """

    cache: str
    selection: str
    scores: str = ""

    @functools.cached_property
    def opened(self) -> tuple[PackedCache, Selection, np.ndarray | None]:
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
        return cache, selection, scores.scores

    def vocabulary(self) -> Vocabulary:
        """The cache's vocabulary."""
        return self.opened[0].vocabulary

    def subset_names(self) -> tuple[str, ...]:
        """The cache's subsets."""
        return self.opened[0].subsets

    def dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        """The selected rows, by ascending row id or in an order shuffled whole by `seed`.

        Raises:
          InputError: See `opened`; or another split than the one selected from.
        """
        cache, selection, scores_N = self.opened
        if split != selection.manifest["split"]:
            raise InputError(
                f"The selection in {self.selection} is of the {selection.manifest['split']} split, "
                f"not of {split}: ask for that split."
            )
        row_ids_m = np.asarray(selection.row_ids)
        if shuffle_files:
            row_ids_m = np.random.default_rng(seed).permutation(row_ids_m)
        rows = cache.split(split)

        def examples() -> Iterator[Mapping[str, Any]]:
            for start in range(0, len(row_ids_m), _BLOCK_ROWS):
                for row in rows.__getitems__(row_ids_m[start : start + _BLOCK_ROWS].tolist()):
                    example = {
                        "targets": row["targets"][row["segment_ids"] > 0],
                        "row_id": row["row_id"],
                        "subset": row["subset"].astype(np.int64),
                    }
                    if scores_N is not None:
                        example["slm_score"] = scores_N[row["row_id"]]
                    yield example

        signature = {
            "targets": tf.TensorSpec((None,), tf.int32),
            "row_id": tf.TensorSpec((), tf.int64),
            "subset": tf.TensorSpec((), tf.int64),
        }
        if scores_N is not None:
            signature["slm_score"] = tf.TensorSpec((), tf.float32)
        return tf.data.Dataset.from_generator(examples, output_signature=signature)


def register_salt_ds(name: str, cache: str, selection: str, scores: str = "") -> seqio.Task:
    """Registers the selected rows as a SeqIO task; the folders are read when it is used.

    Args:
      name: The task's name.
      cache: Folder of the packed cache (`salt prepare`).
      selection: Folder of the selection (`salt select`).
      scores: Folder of the scores (`salt score`); "" leaves `slm_score` out.
    """
    return register_selected_rows(name, lambda: SelectedRows(cache, selection, scores))


def register_selected_rows(name: str, find: Callable[[], SelectedRows]) -> seqio.Task:
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
