"""Reproduces transformers' tokenizer classes, some of which override what tokenizer.json says.

Such classes take only the vocabulary, merges and added tokens from tokenizer.json, or from a
SentencePiece model, and add steps of their own, controlled by tokenizer_config.json. This module
makes a self-contained tokenizer.json that gives the ids of `AutoTokenizer` (transformers 5). Other
classes read tokenizer.json unchanged.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from salt_jax.data.tokenizer_json import behaviour, load_tokenizer

Settings = Mapping[str, Any]  # tokenizer_config.json, with model_type from config.json

BYTE_FALLBACK = {"byte_fallback": True, "fuse_unk": True}
TO_TEXT: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_CONTROL, _USER_DEFINED = 3, 4  # types of SentencePiece's pieces


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class of transformers with steps of its own.

    Attributes:
      name: Its name in tokenizer_config.json, without "Fast".
      steps: From its settings to the parts of tokenizer.json that it overrides.
      special: The pieces of a SentencePiece model that are special tokens whatever their type; a
        class without any doesn't read such models.
      reads_bytes: Whether its steps apply to byte-level tokenizers too.
    """

    name: str
    steps: Callable[[Settings], dict[str, Any]]
    special: tuple[str, ...] = ()
    reads_bytes: bool = True


def byte_level(settings: Settings) -> dict[str, Any]:
    """The steps of a byte-level tokenizer such as GPT-2's."""
    step = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    first = {**step, "add_prefix_space": bool(settings.get("add_prefix_space"))}
    decoder = {**step, "add_prefix_space": True}
    return {"normalizer": None, "pre_tokenizer": first, "decoder": decoder}


GPT2 = TokenizerClass("GPT2Tokenizer", byte_level)


def as_transformers_reads(
    model: bytes, path: pathlib.Path, by: TokenizerClass | None, settings: Settings
) -> bytes:
    """A tokenizer.json that by itself gives the ids that transformers does.

    Args:
      model: The file; returned unchanged if its class changes nothing.
      path: Its name, for errors.
      by: Its class; None for one without steps of its own.
      settings: The tokenizer's settings.
    """
    tokenizer = load_tokenizer(model, path)
    whole = json.loads(tokenizer.to_str())
    if by is None or whole["model"]["type"] != "BPE":
        return model
    if not by.reads_bytes and b'"ByteLevel"' in model:
        return model
    changed = json.dumps(_made(by, settings, whole, whole["model"])).encode()
    same = behaviour(load_tokenizer(changed, path)) == behaviour(tokenizer)
    return model if same else changed


def from_sentencepiece(model: bytes, by: TokenizerClass, settings: Settings) -> bytes:
    """The tokenizer.json that transformers makes of a SentencePiece model."""
    return from_pieces(list(_pieces(model)), by, settings)


def from_pieces(
    pieces: Sequence[tuple[str, int]],
    by: TokenizerClass,
    settings: Settings,
    scores: Sequence[float] | None = None,
) -> bytes:
    """The tokenizer.json of SentencePiece's pieces and their types: a BPE in which any two pieces
    that make a third merge, in the order of the third's score, or else of its id."""
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (-scores[i] if scores else i, len(piece[:at]), (piece[:at], piece[at:]))
        for piece, i in vocab.items()
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:2])
    named = {token_text(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")}
    added = added_tokens(pieces, named | {*by.special})
    whole = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    bpe = {"vocab": vocab, "merges": [list(pair) for _, _, pair in merges]}
    return json.dumps(_made(by, settings, {**whole, "added_tokens": added}, bpe)).encode()


def added_tokens(
    pieces: Sequence[tuple[str, int]], named: Collection[str | None] = ()
) -> list[dict[str, Any]]:
    """The added_tokens of a tokenizer.json: control and user-defined pieces, and those named."""
    return [
        {
            **{"id": i, "content": piece, "special": kind != _USER_DEFINED},
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, (piece, kind) in enumerate(pieces)
        if kind in (_CONTROL, _USER_DEFINED) or piece in named
    ]


def token_text(token: Any) -> str | None:
    """The text of a token of tokenizer_config.json, which may be an object or missing (None)."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _made(
    by: TokenizerClass, settings: Settings, whole: Mapping[str, Any], bpe: Mapping[str, Any]
) -> dict[str, Any]:
    parts = by.steps(settings)
    model = {"type": "BPE", "vocab": bpe["vocab"], "merges": bpe["merges"]}
    return {**whole, **parts, "model": {**model, **parts.get("model", {})}}


def _pieces(model: bytes) -> Iterator[tuple[str, int]]:
    """The pieces of a SentencePiece model and their types: protobuf field 1.

    The sentencepiece library doesn't expose which pieces are user-defined, and its protobuf module
    conflicts with the versions of protobuf that apache-beam needs.
    """
    for field, value in _fields(model):
        if field == 1:
            piece = dict(_fields(value))
            yield piece[1].decode(), piece.get(3, 1)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message's (field number, value), the value being bytes or an integer."""
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or number()
        yield tag >> 3, message[at : at + size]
        at += size
