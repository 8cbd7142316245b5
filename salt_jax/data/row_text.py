"""Shows a packed row as text.

⟨end⟩ is an end of document, ⟨|im_start|⟩ the special token <|im_start|>, ⟦…⟧ tokens without loss
weight, and ┃ a segment boundary. Padding is not shown.
"""

import itertools

import numpy as np

from salt_jax.data.features import Row
from salt_jax.data.vocabularies import Vocabulary

END_OF_DOCUMENT = "⟨end⟩"
SEGMENT_BORDER = "┃"


def row_as_text(row: Row, vocabulary: Vocabulary) -> str:
    """The row's text with loss weights and segments marked."""
    segments = [row["segment_ids"] == i + 1 for i in range(row["segment_ids"].max())]
    return SEGMENT_BORDER.join(
        _segment_as_text(row["targets"][inside_L], row["loss_weights"][inside_L], vocabulary)
        for inside_L in segments
    )


def _segment_as_text(targets_L: np.ndarray, weights_L: np.ndarray, vocabulary: Vocabulary) -> str:
    # A stretch has one loss weight. Ids between special tokens are decoded together, since one
    # character may take several ids.
    marks = {
        token_id: f"⟨{name.removeprefix('<').removesuffix('>')}⟩"
        for token_id, name in vocabulary.special_tokens.items()
    }
    marks[vocabulary.eos_id] = END_OF_DOCUMENT
    text = ""
    for stretch_L in np.split(np.arange(len(targets_L)), np.flatnonzero(np.diff(weights_L)) + 1):
        piece = ""
        for mark, ids in itertools.groupby(targets_L[stretch_L].tolist(), marks.get):
            run = list(ids)
            piece += vocabulary.decode(run) if mark is None else mark * len(run)
        text += piece if weights_L[stretch_L[0]] else f"⟦{piece}⟧"
    return text
