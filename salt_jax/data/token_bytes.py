"""How many UTF-8 bytes of text each id stands for, by the kinds of tokenizers there are.

In: a tokenizer's pieces by id. Out: their bytes, which `Vocabulary.byte_lengths` gives and bits per
byte are made of.
"""

import json
from collections.abc import Mapping

import numpy as np
import sentencepiece
import tokenizers

_SPACE = "▁"  # how SentencePiece writes a space


def sentencepiece_lengths(processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Bytes of each piece, int32[V]; control pieces and the unknown one have none."""

    def one(piece_id: int) -> int:
        if processor.IsControl(piece_id) or processor.IsUnknown(piece_id):
            return 0
        if processor.IsByte(piece_id):
            return 1
        return _text_bytes(processor.IdToPiece(piece_id))

    return np.array([one(i) for i in range(processor.GetPieceSize())], np.int32)


def tokenizer_json_lengths(
    tokenizer: tokenizers.Tokenizer, description: bytes, size: int
) -> np.ndarray:
    """Bytes of each token of a tokenizer.json, int32[size].

    A byte-level one (GPT-2's, Pythia's) writes each byte as one character; the others write text,
    a space as ▁ and, where they fall back on bytes, a byte as <0x0A>. Tokens that were added stand
    for themselves; special ones among them, and gaps between ids, have no bytes.

    Args:
      tokenizer: What the file says.
      description: The file.
      size: One more than the largest id.
    """
    settings = json.loads(description)
    parts = (settings.get("pre_tokenizer"), settings.get("decoder"))
    byte_level = any(mentions(part, "ByteLevel") for part in parts)
    byte_fallback = bool(settings["model"].get("byte_fallback"))
    lengths_V = np.zeros(size, np.int32)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:
            lengths_V[token_id] = len(token)
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            lengths_V[token_id] = 1
        else:
            lengths_V[token_id] = _text_bytes(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[token_id] = 0 if added.special else len(added.content.encode())
    return lengths_V


def _text_bytes(piece: str) -> int:
    return len(piece.replace(_SPACE, " ").encode())


def mentions(part: Mapping | list | None, kind: str) -> bool:
    """Whether a part of a tokenizer, or a part of that, is of a kind."""
    if isinstance(part, list):
        return any(mentions(item, kind) for item in part)
    if not isinstance(part, Mapping):
        return False
    return part.get("type") == kind or any(mentions(value, kind) for value in part.values())
