"""Rows as text."""

import pathlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from salt_jax.data.features import make_row
from salt_jax.data.row_text import row_as_text
from salt_jax.data.vocabularies import ByteVocabulary, HuggingFaceVocabulary


def test_weights_ends_and_segments_are_visible():
    vocabulary = ByteVocabulary()
    targets = [*vocabulary.encode("aé"), 1, *vocabulary.encode("bc"), 1, 0, 0]
    weights = [0, 1, 1, 1, 1, 1, 0, 0, 0]
    segment_ids = [1] * 4 + [2] * 3 + [0] * 2
    row = make_row(np.array(targets), np.array(weights), np.array(segment_ids))
    assert row_as_text(row, vocabulary) == "⟦a⟧é⟨end⟩┃bc⟦⟨end⟩⟧"


def test_special_tokens_are_told_from_text_that_looks_like_one(tmp_path: pathlib.Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "[INST]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = HuggingFaceVocabulary(tmp_path / "tokenizer.json")
    text = "<|im_start|>é ⟨x⟩[INST]<|endoftext|>"
    parsed, plain = vocabulary.encode(text, parse_special=True), vocabulary.encode(text)
    ids = np.array([*parsed, *plain])
    weights = np.array([0] * 3 + [1] * (len(ids) - 3))
    row = make_row(ids, weights, np.ones(len(ids), np.int32))
    shown = "⟦⟨|im_start|⟩é⟧ ⟨x⟩⟨[INST]⟩⟨end⟩"
    assert row_as_text(row, vocabulary) == shown + text
