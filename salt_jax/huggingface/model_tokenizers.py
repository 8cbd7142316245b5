"""Reads the tokenizer of a Hugging Face model's folder as a vocabulary, and writes it back.

A folder has tokenizer.json or tokenizer.model, and files that name the special tokens.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.data.tokenizer_json import load_tokenizer, renumbered_tokens
from salt_jax.data.vocabularies import (
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
)
from salt_jax.errors import InputError, nearest
from salt_jax.huggingface.families import FAMILIES
from salt_jax.huggingface.family import Family
from salt_jax.huggingface.tokenizer_classes import (
    GPT2,
    TokenizerClass,
    as_transformers_reads,
    from_sentencepiece,
    token_text,
)
from salt_jax.huggingface.tokenizer_files import (
    GENERATION_FILE,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    tokenizer_settings,
)
from salt_jax.storage.durable_files import whole_file, write_text


def model_vocabulary(
    folder: pathlib.Path, eos_token: str | None = None, families: Sequence[Family] = FAMILIES
) -> Vocabulary:
    """The vocabulary of a model's folder; InputError if it has none that salt_jax reads.

    Args:
      folder: The folder.
      eos_token: The token that ends a document; by default the one the folder's files name.
      families: The families whose tokenizer classes are supported.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return _hugging_face(folder, eos_token, families)
    if (folder / SENTENCEPIECE_FILE).is_file():
        if eos_token is not None:
            raise InputError(
                f"eos_token is {eos_token!r}, and {folder / SENTENCEPIECE_FILE} has an end of "
                "document of its own: leave --eos_token unset."
            )
        return _sentencepiece(folder, families)
    raise InputError(
        f"{folder} holds neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}: download the tokenizer "
        "into the model's folder, or make the first with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def require_rows(vocabulary: Vocabulary, rows: Any, folder: pathlib.Path) -> None:
    """Refuses a tokenizer with added tokens beyond the rows of the model's embedding.

    If other tokens are beyond it too, it is another model's tokenizer, which `Family.read` reports.
    """
    if not isinstance(rows, int) or not isinstance(vocabulary, HuggingFaceVocabulary):
        return
    beyond = vocabulary.added_tokens_from(rows)
    if beyond and len(beyond) == vocabulary.base_size - rows:
        names = ", ".join(map(repr, beyond[:8]))
        tokens = "an added token" if len(beyond) == 1 else f"{len(beyond)} added tokens"
        raise InputError(
            f"{folder / TOKENIZER_FILE} has {tokens} ({names}) beyond the {rows:,} rows of the "
            f"model's embedding, which end at the id {rows - 1}: delete them from its "
            "added_tokens, or give the model rows for all with transformers, "
            f"model.resize_token_embeddings({vocabulary.base_size}), and save it."
        )


def write_tokenizer(vocabulary: Vocabulary, folder: pathlib.Path) -> list[str]:
    """Writes a vocabulary in transformers' files; returns their names, none if transformers has no
    such tokenizer."""
    if not isinstance(vocabulary, HuggingFaceVocabulary | SentencePieceVocabulary):
        return []
    settings: dict[str, Any] = {
        "eos_token": vocabulary.token(vocabulary.eos_id),
        "bos_token": vocabulary.token(vocabulary.start_id),
        "pad_token": vocabulary.token(vocabulary.pad_id),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    name = TOKENIZER_FILE
    if isinstance(vocabulary, SentencePieceVocabulary):
        name = SENTENCEPIECE_FILE
        # The model's own class would make transformers add that class's special tokens.
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}
        settings["unk_token"] = vocabulary.token(vocabulary.unknown_id)
        settings["add_prefix_space"] = _adds_space(vocabulary)
    with whole_file(folder / name) as file:
        file.write(vocabulary.model_bytes())
    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    return [name, SETTINGS_FILE]


def _sentencepiece(folder: pathlib.Path, families: Sequence[Family]) -> Vocabulary:
    """A SentencePiece model, or the tokenizer transformers makes of it if its ids differ."""
    path = folder / SENTENCEPIECE_FILE
    by, settings = _class_of(folder, families)
    vocabulary = SentencePieceVocabulary(path)
    no_space = not _adds_space(vocabulary) and settings.get("add_prefix_space") is False
    if by is None or not by.special or no_space:
        return vocabulary
    return HuggingFaceVocabulary(
        path,
        eos_token=vocabulary.token(vocabulary.eos_id),
        pad_token=vocabulary.token(vocabulary.pad_id),
        start_token=vocabulary.token(vocabulary.start_id),
        model=from_sentencepiece(path.read_bytes(), by, settings),
    )


def _adds_space(vocabulary: SentencePieceVocabulary) -> bool:
    """Whether a space is prepended to a text."""
    return vocabulary.token(vocabulary.encode("a")[0]).startswith("▁")


def _class_of(
    folder: pathlib.Path, families: Sequence[Family]
) -> tuple[TokenizerClass | None, dict[str, Any]]:
    """The tokenizer class that transformers would use, None if it has no steps of its own, and its
    settings."""
    config = tokenizer_settings(folder / "config.json")
    settings = {"tokenizer_class": config.get("tokenizer_class")}
    settings |= tokenizer_settings(folder / SETTINGS_FILE)
    name, model_type = settings.get("tokenizer_class"), config.get("model_type")
    if not name:
        of_type = [one for one in families if one.model_type == model_type and one.names_tokenizer]
        return next((one.tokenizer for one in of_type), None), settings
    known = [GPT2, *(one.tokenizer for one in families if one.tokenizer)]
    plain = name.removesuffix("Fast") if isinstance(name, str) else ""
    return next((one for one in known if one.name == plain), None), settings


def _hugging_face(
    folder: pathlib.Path, eos_token: str | None, families: Sequence[Family]
) -> Vocabulary:
    path = folder / TOKENIZER_FILE
    model = path.read_bytes()
    tokenizer = load_tokenizer(model, path)
    # The model was trained with the ids in the file.
    for token, (written, read) in renumbered_tokens(model, tokenizer).items():
        raise InputError(
            f"{path} gives the added token {token!r} the id {written}, and tokenizers reads it as "
            f"{read}, since it numbers added tokens in their order and without gaps: put its "
            "added_tokens in the order of their ids, with a token for each id between, or each "
            "into its vocab."
        )
    ids = tokenizer.get_vocab(with_added_tokens=True)
    found = {kind: _special_token(folder, kind, ids) for kind in ("eos", "bos", "pad")}
    eos_token = eos_token or found["eos"]
    if eos_token is None:
        raise InputError(
            f"Nothing in {folder} says which token ends a document: name it with --eos_token=TOKEN."
        )
    if eos_token not in ids:
        raise InputError(
            f"{path} has no token {eos_token!r}{nearest(eos_token, ids)} to end a document with: "
            "name one that it has with --eos_token=TOKEN."
        )
    return HuggingFaceVocabulary(
        path,
        eos_token=eos_token,
        start_token=found["bos"],
        pad_token=found["pad"],
        model=as_transformers_reads(model, path, *_class_of(folder, families)),
    )


def _special_token(folder: pathlib.Path, kind: str, ids: Mapping[str, int]) -> str | None:
    """The eos, bos or pad token, from a file that has its name, else from its id."""
    for name in (SETTINGS_FILE, SPECIAL_TOKENS_FILE):
        token = token_text(tokenizer_settings(folder / name).get(f"{kind}_token"))
        if token is not None and (token in ids or kind == "eos"):
            return token
    for name in (GENERATION_FILE, "config.json"):
        token_id = tokenizer_settings(folder / name).get(f"{kind}_token_id")
        if isinstance(token_id, list) and len(token_id) == 1:
            token_id = token_id[0]
        for token, its_id in ids.items():
            if its_id == token_id:
                return token
    return None
