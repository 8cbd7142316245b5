"""Reads tokenizer.json files, compares their behaviour, and finds characters they would drop.

Files that give every text the same ids have equal `behaviour`, whichever version of transformers or
tokenizers wrote them. A BPE without an unknown token drops characters it has no piece for.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from salt_jax.errors import InputError

# Byte-level tokenizers' letters: a printable byte stands for itself, the others follow from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}

# The piece that stands for dropped characters; no tokenizer has it.
_LOST = "\uffff lost \uffff"


def load_tokenizer(model: bytes, path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json; InputError, naming `path`, if it is malformed."""
    try:
        return tokenizers.Tokenizer.from_str(model.decode("utf-8-sig"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            f"{os.fspath(path)} is not a Hugging Face tokenizer ({error}): name a tokenizer.json."
        ) from error


def renumbered_tokens(model: bytes, tokenizer: tokenizers.Tokenizer) -> dict[str, tuple[int, int]]:
    """Added tokens whose id in the file differs from the library's: {token: (file's, library's)}.

    The library numbers added tokens that are not pieces in the file's order, without gaps.
    """
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    return {
        token["content"]: (token["id"], ids[token["content"]])
        for token in json.loads(model).get("added_tokens", [])
        if ids.get(token["content"], token["id"]) != token["id"]
    }


def behaviour(tokenizer: tokenizers.Tokenizer) -> str:
    """Everything that decides a text's ids, in a normal form.

    Defaults are filled in; no-op steps, decoder, truncation and padding are left out; of the
    post-processor only the special tokens it adds count.
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
    """A tokenizer that marks the characters that the given one drops; None if it drops none.

    A BPE without an unknown token drops characters that it has no piece for, unless it works on
    bytes, or falls back on bytes, and has a piece for each.
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
    """The characters of a text that would be dropped; one may count once for each of its bytes."""
    encoding = marker.encode(text, add_special_tokens=False)
    lost = marker.token_to_id(_LOST)
    places = zip(encoding.ids, encoding.offsets, strict=True)
    return [text[start:end] for token_id, (start, end) in places if token_id == lost]


def pieces_of(tokenizer: tokenizers.Tokenizer, description: bytes, size: int) -> list[bytes]:
    """Each token's text in UTF-8, where `description` is the tokenizer.json and `size` one more
    than the largest id.

    Byte-level tokenizers (GPT-2, Pythia) write each byte as one character; others write text, a
    space as ▁ and, with byte fallback, a byte as <0x0A>. Added tokens stand for themselves; special
    tokens and unused ids are empty.
    """
    settings = json.loads(description)
    byte_level = _mentions([settings.get("pre_tokenizer"), settings.get("decoder")], "ByteLevel")
    byte_fallback = bool(settings["model"].get("byte_fallback"))
    pieces = [b""] * size
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:
            pieces[token_id] = bytes(_BYTES.get(letter, 0) for letter in token)
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            pieces[token_id] = byte_of(token)
        else:
            pieces[token_id] = piece_bytes(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        pieces[token_id] = b"" if added.special else added.content.encode()
    return pieces


def piece_bytes(piece: str) -> bytes:
    """The UTF-8 of a SentencePiece piece, in which ▁ is a space."""
    return piece.replace("▁", " ").encode()


def byte_of(piece: str) -> bytes:
    """The byte that byte fallback writes as <0x0A>."""
    return bytes([int(piece[1:-1], 16)])


def _mentions(part: Mapping[str, Any] | list[Any] | None, kind: str) -> bool:
    """Whether a tokenizer's part, or anything nested in it, is of a kind."""
    if isinstance(part, Mapping):
        return part.get("type") == kind or _mentions(list(part.values()), kind)
    return isinstance(part, list) and any(_mentions(item, kind) for item in part)


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A part's steps, with sequences flattened."""
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
