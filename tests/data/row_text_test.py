"""Rows as text."""

import numpy as np

from salt_jax.data.features import make_row
from salt_jax.data.row_text import row_as_text
from salt_jax.data.vocabularies import ByteVocabulary


def test_weights_ends_and_segments_are_visible():
    vocabulary = ByteVocabulary()
    targets = [*vocabulary.encode("aé"), 1, *vocabulary.encode("bc"), 1, 0, 0]
    weights = [0, 1, 1, 1, 1, 1, 0, 0, 0]
    segment_ids = [1] * 4 + [2] * 3 + [0] * 2
    row = make_row(np.array(targets), np.array(weights), np.array(segment_ids))
    assert row_as_text(row, vocabulary) == "⟦a⟧é⟨end⟩┃bc⟦⟨end⟩⟧"
