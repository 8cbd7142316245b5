"""The ids of two vocabularies that stand for the same text."""

import re
from typing import NamedTuple

import numpy as np

from salt_jax.data.abstract_vocabulary import Vocabulary

_STAND_IN = re.compile("<0x[0-9A-F]{2}>")


class SharedPieces(NamedTuple):
    """For each id of one vocabulary, an id of another.

    Attributes:
      ids: int32[V], the other's id with the same text; where it has none, its id with the longest
        end of the text (an approximation for reading), or -1.
      shared: bool[V], whether the text is the same.
    """

    ids: np.ndarray
    shared: np.ndarray


def shared_pieces(vocabulary: Vocabulary, other: Vocabulary) -> SharedPieces:
    """Finds each id of `vocabulary` in `other`, by its bytes; end and start of document agree.

    Of several ids with the same bytes a piece is shared, not the single byte (<0x0A>) that stands
    in for what no piece covers.
    """
    own, found = _ids(vocabulary), _ids(other)
    ids_V = np.full(vocabulary.size, -1, np.int32)
    shared_V = np.zeros(vocabulary.size, bool)
    for token_id, piece in enumerate(vocabulary.pieces):
        shared_V[token_id] = piece in found and own[piece] == token_id
        ends = (found[piece[start:]] for start in range(len(piece)) if piece[start:] in found)
        ids_V[token_id] = next(ends, -1)
    # Padding first: it may be the same id as one of the others.
    for name in ("pad_id", "start_id", "eos_id"):
        ids_V[getattr(vocabulary, name)] = getattr(other, name)
    shared_V[vocabulary.eos_id] = True
    return SharedPieces(ids_V, shared_V)


def _ids(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The id of each piece."""
    ids: dict[bytes, int] = {}
    for token_id, piece in enumerate(vocabulary.pieces):
        is_known = piece in ids
        if piece and not (is_known and _STAND_IN.fullmatch(vocabulary.token(token_id) or "")):
            ids[piece] = token_id
    return ids
