"""Adapters between the vocabularies of salt_jax and those of SeqIO, with equal ids.

They also accept a function that makes the vocabulary, so that registering a task reads no file.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from salt_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from salt_jax.errors import InputError
from salt_jax.t5x.quiet_tensorflow import seqio, tf


class SeqIOVocabulary(seqio.Vocabulary):
    """A vocabulary of salt_jax, or a function that makes it when first used, as a SeqIO vocabulary;
    reserved ids are SeqIO's extra ids. `parse_special` is that of `Vocabulary.encode`."""

    def __init__(
        self, vocabulary: Vocabulary | Callable[[], Vocabulary], parse_special: bool = False
    ):
        self._parse_special = parse_special
        self._vocabulary = vocabulary

    @property
    def wrapped(self) -> Vocabulary:
        """The vocabulary of salt_jax."""
        if not isinstance(self._vocabulary, Vocabulary):
            self._vocabulary = self._vocabulary()
        return self._vocabulary

    @property
    def eos_id(self) -> int:
        return self.wrapped.eos_id

    @property
    def bos_id(self) -> int:
        return self.wrapped.start_id

    @property
    def pad_id(self) -> int:
        return self.wrapped.pad_id

    @property
    def unk_id(self) -> None:
        """None: vocabularies of salt_jax encode every text without unknown ids."""
        return None

    @property
    def extra_ids(self) -> int:
        return self.wrapped.reserved

    @property
    def _base_vocab_size(self) -> int:
        return self.wrapped.base_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.wrapped.encode(s, self._parse_special)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.wrapped.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: Any) -> np.ndarray:
            # Bytes inside a dataset, an array of rank 0 in eager mode.
            return np.array(self._encode(np.asarray(text).item().decode()), np.int32)

        text = tf.convert_to_tensor(s, tf.string)
        return tf.ensure_shape(tf.numpy_function(encode, [text], tf.int32, stateful=False), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(values: np.ndarray) -> Any:
            if values.ndim == 1:
                return self.wrapped.decode(values.tolist()).encode()
            return np.array([decode(row) for row in values], object)

        ids = tf.convert_to_tensor(ids)
        shape = ids.shape[:-1]
        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeqIOVocabulary) and self.wrapped == other.wrapped

    def __hash__(self) -> int:
        return hash(self.wrapped)

    def __str__(self) -> str:
        read = isinstance(self._vocabulary, Vocabulary)
        return f"SeqIOVocabulary({self._vocabulary if read else 'not read yet'})"


class SubsetVocabulary(seqio.PassThroughVocabulary):
    """A pass-through vocabulary of subset ids, with the subsets' names by id, or a function that
    returns them when first used."""

    def __init__(self, names: Sequence[str] | Callable[[], Sequence[str]]):
        super().__init__(size=0)
        self._names = names

    @property
    def names(self) -> tuple[str, ...]:
        if callable(self._names):
            self._names = tuple(self._names())
        return tuple(self._names)

    @property
    def _base_vocab_size(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SubsetVocabulary) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)

    def __str__(self) -> str:
        return "SubsetVocabulary()"


def vocabulary_of(vocabulary: seqio.Vocabulary, task: str) -> Vocabulary:
    """The vocabulary of salt_jax for one of SeqIO; InputError if it has no counterpart."""
    if isinstance(vocabulary, SeqIOVocabulary):
        return vocabulary.wrapped
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(reserved=vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return SentencePieceVocabulary(
            vocabulary.sentencepiece_model_file, reserved=vocabulary.extra_ids
        )
    raise InputError(
        f"The task {task!r} has a {type(vocabulary).__name__} for its targets, expected a "
        "SeqIOVocabulary, seqio.SentencePieceVocabulary or seqio.ByteVocabulary: change the task."
    )
