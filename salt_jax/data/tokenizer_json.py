"""Reads Hugging Face's tokenizer.json, compares two by what they do, and finds what one would lose.

All files that give every text the same ids have one `behaviour`, whichever version of transformers
or tokenizers wrote them. A BPE without an unknown token leaves out characters it has no piece for.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from salt_jax.errors import InputError

# The piece that marks what is lost; no tokenizer has it.
_LOST = "\uffff lost \uffff"


def load_tokenizer(model: bytes, path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json; `path` is its name for the InputError if it is none."""
    try:
        return tokenizers.Tokenizer.from_str(model.decode("utf-8-sig"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            f"{os.fspath(path)} is no Hugging Face tokenizer ({error}): name a tokenizer.json."
        ) from error


def renumbered_tokens(model: bytes, tokenizer: tokenizers.Tokenizer) -> dict[str, tuple[int, int]]:
    """The added tokens that don't get the id that a tokenizer.json says, with both ids, its first.

    The library numbers those that are no pieces in the file's order and without gaps.
    """
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    return {
        token["content"]: (token["id"], ids[token["content"]])
        for token in json.loads(model).get("added_tokens", [])
        if ids.get(token["content"], token["id"]) != token["id"]
    }


def behaviour(tokenizer: tokenizers.Tokenizer) -> str:
    """What decides a text's ids, in one form whoever wrote the file.

    Defaults are filled in; steps that do nothing, decoder, truncation and padding are left out; of
    the post-processor only the special tokens count that it adds.
    """
    whole = json.loads(tokenizer.to_str())
    model = {name: value for name, value in whole["model"].items() if value not in (None, "")}
    if "unk_token" not in model:
        model.pop("fuse_unk", None)
    return json.dumps(
        {
            "model": model,
            "added_tokens": sorted(whole["added_tokens"], key=lambda token: token["id"]),
            "normalizer": _steps(whole["normalizer"]),
            "pre_tokenizer": _steps(whole["pre_tokenizer"]),
            "post_processor": [step for step in _steps(whole["post_processor"]) if _adds(step)],
        },
        sort_keys=True,
    )


def loss_marker(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """A tokenizer that marks what the given one leaves out; None where it leaves nothing out.

    A BPE without an unknown token passes over characters that it has no piece for, unless its
    pieces are bytes, or it falls back on bytes, and has all of them.
    """
    bpe = tokenizer.model
    if not isinstance(bpe, models.BPE) or bpe.unk_token is not None:
        return None
    whole = json.loads(tokenizer.to_str())
    pieces = whole["model"]["vocab"]
    if bpe.byte_fallback and all(f"<0x{byte:02X}>" in pieces for byte in range(256)):
        return None
    if (
        _mentions([whole["normalizer"], whole["pre_tokenizer"]], "ByteLevel")
        and all(letter in pieces for letter in pre_tokenizers.ByteLevel.alphabet())
        and not (bpe.continuing_subword_prefix or bpe.end_of_word_suffix)
    ):
        return None
    pieces[_LOST] = 1 + max(pieces.values(), default=-1)
    whole["model"] |= {"unk_token": _LOST, "fuse_unk": False}
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


def lost_characters(marker: tokenizers.Tokenizer, text: str) -> list[str]:
    """What a text would lose, by its `loss_marker`; a character may count once for each byte."""
    encoding = marker.encode(text, add_special_tokens=False)
    lost = marker.token_to_id(_LOST)
    places = zip(encoding.ids, encoding.offsets, strict=True)
    return [text[start:end] for token_id, (start, end) in places if token_id == lost]


def byte_lengths(tokenizer: tokenizers.Tokenizer, description: bytes, size: int) -> np.ndarray:
    """UTF-8 bytes that each token of a tokenizer.json stands for, int32[size].

    A byte-level one (GPT-2's, Pythia's) writes each byte as one character; the others write text,
    a space as ▁ and, where they fall back on bytes, a byte as <0x0A>. Tokens that were added stand
    for themselves; special ones among them, and gaps between ids, have no bytes.

    Args:
      tokenizer: What the file says.
      description: The file.
      size: One more than the largest id.
    """
    settings = json.loads(description)
    byte_level = _mentions([settings.get("pre_tokenizer"), settings.get("decoder")], "ByteLevel")
    byte_fallback = bool(settings["model"].get("byte_fallback"))
    lengths_V = np.zeros(size, np.int32)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:
            lengths_V[token_id] = len(token)
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            lengths_V[token_id] = 1
        else:
            lengths_V[token_id] = piece_bytes(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[token_id] = 0 if added.special else len(added.content.encode())
    return lengths_V


def piece_bytes(piece: str) -> int:
    """UTF-8 bytes of a piece as SentencePiece writes it, ▁ for a space."""
    return len(piece.replace("▁", " ").encode())


def _mentions(part: Mapping[str, Any] | list[Any] | None, kind: str) -> bool:
    """Whether a part of a tokenizer, or a part of that, is of a kind."""
    if isinstance(part, Mapping):
        return part.get("type") == kind or _mentions(list(part.values()), kind)
    return isinstance(part, list) and any(_mentions(item, kind) for item in part)


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A part's steps one after another: a sequence of one is that one, and none is nothing."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        (steps,) = (value for value in part.values() if isinstance(value, list))
        return [inner for step in steps for inner in _steps(step)]
    return [{name: value for name, value in part.items() if name != "trim_offsets"}]


def _adds(step: Mapping[str, Any]) -> bool:
    """Whether a step of a post-processor adds tokens to a text."""
    pieces = step.get("single", [None])
    return step["type"] != "ByteLevel" and any("Sequence" not in (piece or {}) for piece in pieces)
