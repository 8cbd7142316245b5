"""A SeqIO task over the already packed rows of a cache, for training with T5X.

The train split yields the rows of `salt train`, endlessly, from any step on, with stored soft
labels and a selection for stage 1; the other splits yield their rows once, in order. One example
per row, with the feature names of SeqIO's own converters (L tokens, K ids):

    decoder_target_tokens   int32[L]
    decoder_input_tokens    int32[L]     targets shifted right inside each document
    decoder_loss_weights    float32[L]   the row's own
    decoder_segment_ids     int32[L]
    decoder_positions       int32[L]
    soft_ids                int32[L, K]  stage 1, with soft labels: label_format.Labels
    soft_log_q              float16[L, K]
    soft_rest               float16[L]
    soft_teacher_loss       float16[L]

Use seqio.PassThroughFeatureConverter, since no conversion is needed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from salt_jax.data import input_pipeline
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import RowOrder
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.distill.losses import LossConfig
from salt_jax.errors import InputError
from salt_jax.t5x.quiet_tensorflow import seqio, tf
from salt_jax.t5x.seqio_adapters import SeqIOVocabulary


class _Feature(NamedTuple):
    """A feature of the task: its name in a batch of salt_jax, its dtype and its rank."""

    ours: str
    dtype: tf.DType
    rank: int = 1


_ROW = {
    "decoder_target_tokens": _Feature("targets", tf.int32),
    "decoder_input_tokens": _Feature("inputs", tf.int32),
    "decoder_loss_weights": _Feature("loss_weights", tf.float32),
    "decoder_segment_ids": _Feature("segment_ids", tf.int32),
    "decoder_positions": _Feature("positions", tf.int32),
}
_LABELS = {
    "soft_ids": _Feature("soft_ids", tf.int32, 2),
    "soft_log_q": _Feature("soft_log_q", tf.float16, 2),
    "soft_rest": _Feature("soft_rest", tf.float16),
    "soft_teacher_loss": _Feature("soft_teacher_loss", tf.float16),
}
_VALIDATION_ROWS = 64  # read at a time
_LAST_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Which rows are read, and from which step on.

    Attributes:
      cache: Folder of `salt prepare`.
      batch_size: Rows per step, equal to T5X's: it determines which rows a step reads.
      seed: The order's seed, `data.seed` of `salt train`.
      first_step: The step of the first row; for stage 2, the number of steps of stage 1.
      soft_labels: Folder of `salt score --soft_labels=K`, for stage 1; None for none.
      selection: Folder of `salt select`, whose rows stage 1 reads (SALT_DS); None reads all rows.
      loss: The loss that uses the soft labels.
    """

    cache: str
    batch_size: int
    seed: int = 0
    first_step: int = 0
    soft_labels: str | None = None
    selection: str | None = None
    loss: LossConfig = LossConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        # Under T5X, gin doesn't check types.
        for name, least in (("batch_size", 1), ("first_step", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(
                    f"PackedRows.{name} is {value!r}: set it to a whole number of at least {least}."
                )

    @functools.cached_property
    def opened(self) -> tuple[PackedCache, Selection | None, StoredLabels | None]:
        """The cache, and stage 1's selection and soft labels.

        Raises:
          InputError: One is missing, incomplete or of another cache; the cache's id 0 is not
            padding only; or the labels don't fit the rows or the loss.
        """
        cache = PackedCache.open(self.cache)
        if cache.vocabulary.pad_id != 0 or cache.vocabulary.eos_id == 0:
            raise InputError(
                f"The vocabulary of the cache {self.cache} has the padding id "
                f"{cache.vocabulary.pad_id} and the end of document {cache.vocabulary.eos_id}, and "
                "T5X takes id 0 for padding: prepare the text with a vocabulary whose id 0 is "
                "padding only."
            )
        selection, labels = None, None
        if self.selection is not None:
            selection = Selection.open(self.selection, cache_digest=cache.digest)
        if self.soft_labels is not None:
            labels = StoredLabels.open(self.soft_labels, cache_digest=cache.digest)
            labels.require_fit(
                temperature=self.loss.teacher_temperature,
                k=self.loss.teacher_top_k,
                selection_digest=selection.digest if selection else None,
            )
        return cache, selection, labels

    def dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        """The rows of a split in salt_jax's order, ignoring SeqIO's shuffling; InputError as
        `opened`, or if the cache has no such split."""
        del shuffle_files, seed
        cache, _, labels = self.opened
        split_rows, features, sizes = cache.split(split), _ROW, [cache.sequence_length]
        if split == "train" and labels is not None:
            features, sizes = _ROW | _LABELS, [cache.sequence_length, labels.format.k]

        def batches() -> Iterator[Mapping[str, Any]]:
            read = self._training() if split == "train" else self._in_order(split_rows)
            for batch in read:
                yield {name: batch[feature.ours] for name, feature in features.items()}

        signature = {
            name: tf.TensorSpec((None, *sizes[: feature.rank]), feature.dtype)
            for name, feature in features.items()
        }
        return tf.data.Dataset.from_generator(batches, output_signature=signature).unbatch()

    def _training(self) -> Iterator[Mapping[str, np.ndarray]]:
        cache, selection, labels = self.opened
        rows = cache.split("train")
        pipeline = input_pipeline.InputPipeline(
            sources={"cache": rows},
            batch_size=self.batch_size,
            start_id=cache.start_id,
            all_rows=RowOrder(None, len(rows), self.seed),
            selected_rows=RowOrder(selection.row_ids, 0, self.seed) if selection else None,
            # A launch of T5X is one stage.
            stage1_steps=_LAST_STEP if selection or labels else 0,
            soft_labels=labels,
        )
        return pipeline.batches(self.first_step, _LAST_STEP)

    def _in_order(self, rows: Any) -> Iterator[Mapping[str, np.ndarray]]:
        start_id = self.opened[0].start_id
        for batch in input_pipeline.in_order(rows, _VALIDATION_ROWS, start_id):
            real_B = batch["row_id"] >= 0
            yield {name: array[real_B] for name, array in batch.items()}


def register(name: str, rows: PackedRows) -> str:
    """Opens rows and registers them as a SeqIO task, idempotently; returns its name, for T5X's
    mixture_or_task_name. InputError as `PackedRows.opened`."""
    rows.opened  # noqa: B018 (before T5X makes a model)
    return _registered(name, rows).name


def vocabulary(cache: str) -> SeqIOVocabulary:
    """The vocabulary of a cache, for T5X's model."""
    return SeqIOVocabulary(PackedCache.open(cache).vocabulary)


@functools.cache
def _registered(name: str, rows: PackedRows) -> seqio.Task:
    cache, _, _ = rows.opened
    output_features: dict[str, seqio.Feature] = {
        name: seqio.ContinuousFeature(
            dtype=feature.dtype, rank=feature.rank, required=name not in _LABELS
        )
        for name, feature in (_ROW | _LABELS).items()
    }
    tokens = seqio.Feature(SeqIOVocabulary(cache.vocabulary), add_eos=False)
    output_features |= {name: tokens for name in _ROW if name.endswith("_tokens")}
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(rows.dataset, splits=cache.split_names),
        output_features=output_features,
        preprocessors=[],
        shuffle_buffer_size=None,  # the order is salt_jax's
    )
