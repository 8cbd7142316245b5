"""Makes tokenizer.json and tokenizer_config.json from the metadata of a GGUF file.

llama.cpp keeps tokens with their types, numbered as SentencePiece's, and merges or scores; how text
is split is a name there ("llama-bpe"), which stands for a rule in its code (src/llama-vocab.cpp).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface.families import llama
from salt_jax.huggingface.tokenizer_classes import added_tokens, byte_level, from_pieces

_PREFIX = "tokenizer.ggml."
_IDS = {"eos": "eos", "bos": "bos", "unk": "unknown", "pad": "padding"}
_SPLIT_LLAMA_3 = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
_DIGITS = {"type": "Digits", "individual_digits": True}
# The step before bytes by the name of the rule, None for GPT-2's own.
_SPLITS: Mapping[str, dict[str, Any] | None] = {
    **dict.fromkeys(("gpt-2", "olmo"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _SPLIT_LLAMA_3),
}


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the special tokens, as fields of config.json."""
    ids = {
        f"{name}_token_id": metadata.get(f"{_PREFIX}{key}_token_id") for name, key in _IDS.items()
    }
    return {name: token_id for name, token_id in ids.items() if isinstance(token_id, int)}


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> tuple[bytes, dict[str, Any]]:
    """tokenizer.json and the settings of tokenizer_config.json.

    Args:
      metadata: The file's values by key.
      where: The file, for errors.

    Raises:
      InputError: The file has no tokenizer, or one that salt_jax doesn't read.
    """
    kind, tokens = metadata.get(f"{_PREFIX}model"), metadata.get(f"{_PREFIX}tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        found = "no tokenizer" if kind is None else f"a tokenizer of the kind {kind!r}"
        raise InputError(
            f"{where} has {found}, expected 'gpt2' (bytes) or 'llama' (SentencePiece): import the "
            "model that it was made of, with its tokenizer."
        )
    types = metadata.get(f"{_PREFIX}token_type") or [1] * len(tokens)
    pieces = list(zip(map(str, tokens), types, strict=False))
    settings = {
        f"{name.removesuffix('_id')}": pieces[token_id][0]
        for name, token_id in token_ids(metadata).items()
        if 0 <= token_id < len(pieces)
    }
    settings |= {"clean_up_tokenization_spaces": False}
    for key, name in (
        (f"{_PREFIX}add_bos_token", "add_bos_token"),
        ("tokenizer.chat_template", "chat_template"),
    ):
        if key in metadata:
            settings[name] = metadata[key]
    if kind == "gpt2":
        return _bytes(metadata, pieces, where), {
            **{"tokenizer_class": "PreTrainedTokenizerFast"},
            **settings,
        }
    by = llama.FAMILY.tokenizer
    assert by is not None, "LlamaTokenizer has steps of its own"
    own = {"tokenizer_class": by.name, "add_bos_token": True, "legacy": False}
    own["add_prefix_space"] = metadata.get(f"{_PREFIX}add_space_prefix", True)
    scores = metadata.get(f"{_PREFIX}scores")
    return from_pieces(pieces, by, own | settings, scores), own | settings


def _bytes(metadata: Mapping[str, Any], pieces: Sequence[tuple[str, int]], where: str) -> bytes:
    """The tokenizer.json of a BPE of bytes."""
    rule = str(metadata.get(f"{_PREFIX}pre"))
    if rule not in _SPLITS:
        raise InputError(
            f"{where} splits text by the rule {rule!r}, expected one of {', '.join(_SPLITS)}: "
            "import the model that it was made of, with its tokenizer."
        )
    steps, split = byte_level({}), _SPLITS[rule]
    if split is not None:
        level = {**steps["pre_tokenizer"], "use_regex": split is _DIGITS}
        steps["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    model = {
        "type": "BPE",
        "vocab": {token: i for i, (token, _) in enumerate(pieces)},
        "merges": [merge.split(" ") for merge in metadata.get(f"{_PREFIX}merges", [])],
        # Llama 3's takes a word that is a token as it is.
        "ignore_merges": split is _SPLIT_LLAMA_3,
    }
    return json.dumps(
        {"version": "1.0", "added_tokens": added_tokens(pieces), **steps, "model": model}
    ).encode()
