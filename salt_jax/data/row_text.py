"""A packed row as text, for people.

In: a row and its vocabulary. Out: its text, where ⟨end⟩ is an end of document, ⟦…⟧ tokens without
loss weight, and ┃ the border between two segments. Padding is not shown.
"""

import numpy as np

from salt_jax.data.features import Row
from salt_jax.data.vocabularies import Vocabulary

END_OF_DOCUMENT = "⟨end⟩"
SEGMENT_BORDER = "┃"


def row_as_text(row: Row, vocabulary: Vocabulary) -> str:
    """The row's text with its loss weights and segments made visible."""
    segment_ids_L = row["segment_ids"]
    parts = []
    for segment in range(1, int(segment_ids_L.max()) + 1):
        inside_L = segment_ids_L == segment
        parts.append(
            _segment_as_text(row["targets"][inside_L], row["loss_weights"][inside_L], vocabulary)
        )
    return SEGMENT_BORDER.join(parts)


def _segment_as_text(targets_L: np.ndarray, weights_L: np.ndarray, vocabulary: Vocabulary) -> str:
    # A stretch ends where the weight changes and around each end of document; within a stretch ids
    # are decoded together, since one character may be several ids.
    is_end_L = targets_L == vocabulary.eos_id
    changes_L = (np.diff(weights_L) != 0) | is_end_L[1:] | is_end_L[:-1]
    text = ""
    for stretch_L in np.split(np.arange(len(targets_L)), np.flatnonzero(changes_L) + 1):
        first = stretch_L[0]
        piece = END_OF_DOCUMENT if is_end_L[first] else vocabulary.decode(targets_L[stretch_L])
        text += piece if weights_L[first] else f"⟦{piece}⟧"
    return text
