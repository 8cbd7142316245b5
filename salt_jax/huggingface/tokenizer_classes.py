"""Tokenizers as the classes of transformers read them, which decide more than the file says.

In: a tokenizer.json or a SentencePiece model, and the settings beside it. Out: a tokenizer.json
that gives the ids of `AutoTokenizer` (transformers 5). Some classes take from the file no more than
its vocabulary, merges and added tokens, and bring steps of their own, which `add_prefix_space` and
`legacy` of tokenizer_config.json change. Any other class reads tokenizer.json as it stands.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from salt_jax.data.tokenizer_json import behaviour, load_tokenizer

Settings = Mapping[str, Any]

_BYTES = {"byte_fallback": True, "fuse_unk": True}
_CONTROL, _USER_DEFINED = 3, 4  # types of SentencePiece's pieces
_REGISTERED = {"gpt_neox": "GPTNeoXTokenizer", "gemma": "GemmaTokenizer"}  # by model_type


def _byte_level(settings: Settings) -> dict[str, Any]:
    step = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    first = {**step, "add_prefix_space": bool(settings.get("add_prefix_space"))}
    return {"normalizer": None, "pre_tokenizer": first, "decoder": {**step, **_ANY_PREFIX}}


def _gpt_neox(settings: Settings) -> dict[str, Any]:
    return {**_byte_level(settings), "normalizer": {"type": "NFC"}}


def _llama(settings: Settings) -> dict[str, Any]:
    prefix = settings.get("add_prefix_space")
    scheme = "always" if settings.get("legacy") else "first"
    scheme = "never" if prefix is not None and not prefix else scheme
    strip = [] if scheme == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    decoder = {"type": "Sequence", "decoders": [*_TO_TEXT, *strip]}
    return {"normalizer": None, "pre_tokenizer": metaspace, "decoder": decoder, "model": _BYTES}


def _gemma(settings: Settings) -> dict[str, Any]:
    space: dict[str, Any] = {"pattern": {"String": " "}}
    split = {"type": "Split", **space, "behavior": "MergedWithPrevious", "invert": False}
    unknown = _text(settings.get("unk_token")) or "<unk>"
    return {
        "normalizer": {"type": "Replace", **space, "content": "▁"},
        "pre_tokenizer": split,
        "decoder": {"type": "Sequence", "decoders": _TO_TEXT},
        "model": {**_BYTES, "unk_token": unknown},
    }


_ANY_PREFIX = {"add_prefix_space": True}
_TO_TEXT = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_CLASSES: Mapping[str, Callable[[Settings], dict[str, Any]]] = {
    "GPT2Tokenizer": _byte_level,
    "GPTNeoXTokenizer": _gpt_neox,
    "LlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
}


def as_transformers_reads(model: bytes, path: pathlib.Path, settings: Settings) -> bytes:
    """A tokenizer.json that does by itself what transformers makes of it.

    Args:
      model: The file; it is given back as it is where its class changes nothing.
      path: Its name, for errors.
      settings: See `class_name`.

    Raises:
      InputError: The file is no tokenizer.
    """
    name, tokenizer = class_name(settings), load_tokenizer(model, path)
    whole = json.loads(tokenizer.to_str())
    # Llama 3's tokenizer is named as Llama 2's is, and is read as it stands.
    of_bytes = name == "LlamaTokenizer" and b'"ByteLevel"' in model
    if name not in _CLASSES or whole["model"]["type"] != "BPE" or of_bytes:
        return model
    changed = json.dumps(_made(name, settings, whole, whole["model"])).encode()
    same = behaviour(load_tokenizer(changed, path)) == behaviour(tokenizer)
    return model if same else changed


def from_sentencepiece(model: bytes, settings: Settings) -> bytes:
    """The tokenizer.json that transformers makes of a SentencePiece model for a class of Llama's or
    Gemma's: any two pieces that make a third one are merged, the third's with the lowest id first.

    Args:
      model: The .model file.
      settings: See `class_name`.
    """
    pieces = list(_pieces(model))
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (i, len(piece[:at]), (piece[:at], piece[at:]))
        for piece, i in vocab.items()
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:2])
    named = {_text(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")}
    named |= {"<unk>", "<s>", "</s>"} if class_name(settings) == "LlamaTokenizer" else {"<unk>"}
    added = [
        {
            **{"id": i, "content": piece, "special": kind != _USER_DEFINED},
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, (piece, kind) in enumerate(pieces)
        if kind in (_CONTROL, _USER_DEFINED) or piece in named
    ]
    whole = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    bpe = {"vocab": vocab, "merges": [list(pair) for _, _, pair in merges]}
    made = _made(class_name(settings), settings, {**whole, "added_tokens": added}, bpe)
    return json.dumps(made).encode()


def class_name(settings: Settings) -> str:
    """The class that reads a tokenizer.

    Args:
      settings: tokenizer_config.json's, with config.json's model_type.
    """
    name = settings.get("tokenizer_class") or _REGISTERED.get(settings.get("model_type") or "", "")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _made(
    name: str, settings: Settings, whole: Mapping[str, Any], bpe: Mapping[str, Any]
) -> dict[str, Any]:
    parts = _CLASSES[name](settings)
    model = {"type": "BPE", "vocab": bpe["vocab"], "merges": bpe["merges"]}
    return {**whole, **parts, "model": {**model, **parts.get("model", {})}}


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _pieces(model: bytes) -> Iterator[tuple[str, int]]:
    """The pieces of a SentencePiece model and their types: its field 1, in protobuf's format."""
    for field, value in _fields(model):
        if field == 1:
            piece = dict(_fields(value))
            yield piece[1].decode(), piece.get(3, 1)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A message's fields by number: bytes, or a whole number."""
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
