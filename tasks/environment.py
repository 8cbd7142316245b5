"""The environment variables that name the files of this package's tasks.

They are read when a task is used, not when it is registered:

    SALT_TEXT        pattern of your own text files; unset: the Python library's sources
    SALT_VOCABULARY  a SentencePiece .model, a tokenizer.json, or the vocabulary/ folder of a
                     cache; unset: bytes
    SALT_CACHE       folder of `salt prepare`
    SALT_SELECTION   folder of `salt select`
    SALT_SCORES      folder of `salt score`; unset: rows without scores
    SALT_SCORE_K     the k to use if it has several and no selection says
"""

import os
import pathlib

from salt_jax.data.vocabularies import (
    ByteVocabulary,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
)
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.t5x.salt_ds import CacheRows


def chosen_vocabulary() -> Vocabulary:
    """The vocabulary that SALT_VOCABULARY names."""
    given = os.environ.get("SALT_VOCABULARY")
    if not given:
        return ByteVocabulary()
    if pathlib.Path(given).is_dir():
        return load_vocabulary(given)
    return (
        HuggingFaceVocabulary(given) if given.endswith(".json") else SentencePieceVocabulary(given)
    )


def selected_rows() -> CacheRows:
    """The rows that SALT_CACHE, SALT_SELECTION and (if set) SALT_SCORES name."""
    return CacheRows(
        cache=_required("SALT_CACHE", "the folder of a packed cache"),
        selection=_required("SALT_SELECTION", "the folder of a selection"),
        scores=os.environ.get("SALT_SCORES", ""),
        score=_score(),
    )


def scored_rows() -> CacheRows:
    """All rows of SALT_CACHE with the scores that SALT_SCORES names."""
    return CacheRows(
        cache=_required("SALT_CACHE", "the folder of a packed cache"),
        scores=_required("SALT_SCORES", "the folder of its scores"),
        score=_score(),
    )


def _score() -> ScoreConfig:
    given = os.environ.get("SALT_SCORE_K", "")
    if given and not given.isdigit():
        raise InputError(f"The environment variable SALT_SCORE_K is {given!r}: set it to a number.")
    return ScoreConfig(k=int(given) if given else None)


def _required(variable: str, what: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise InputError(f"The environment variable {variable} is not set: set it to {what}.")
    return value
