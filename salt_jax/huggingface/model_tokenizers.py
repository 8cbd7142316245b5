"""The tokenizer in a model's folder, as Hugging Face's models have it, as a vocabulary, and back.

In: a folder with tokenizer.json or tokenizer.model, and files that name the special tokens.
Out: the vocabulary. The other way: the files that transformers reads, from a vocabulary.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from salt_jax.data.tokenizer_json import load_tokenizer, renumbered_tokens
from salt_jax.data.vocabularies import (
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
)
from salt_jax.errors import InputError, nearest
from salt_jax.huggingface.safetensors_files import DOWNLOAD
from salt_jax.huggingface.tokenizer_classes import (
    as_transformers_reads,
    class_name,
    from_sentencepiece,
)
from salt_jax.storage.durable_files import whole_file, write_text
from salt_jax.storage.json_files import read_json_object

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer_config.json"

GENERATION_FILE = "generation_config.json"

# All that belongs to a tokenizer, and what generation starts and stops with.
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", GENERATION_FILE),
)
_TEMPLATES = "additional_chat_templates"  # a folder of more templates, each by its name

# Of a run whose model was taken in, or started from such a one: these files as they came.
TOKENIZER_FOLDER = "tokenizer"

_SPACE = "\u2581"  # as SentencePiece writes it


def model_vocabulary(folder: pathlib.Path, eos_token: str | None = None) -> Vocabulary:
    """The vocabulary of a model's folder.

    Args:
      folder: The folder.
      eos_token: The token that ends a document; by default what the folder's files say.

    Raises:
      InputError: No tokenizer, or none that salt_jax reads, or no token ends a document.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return _hugging_face(folder, eos_token)
    if (folder / SENTENCEPIECE_FILE).is_file():
        if eos_token is not None:
            raise InputError(
                f"eos_token is {eos_token!r}, and {folder / SENTENCEPIECE_FILE} has an end of "
                "document of its own: leave --eos_token unset."
            )
        return _sentencepiece(folder)
    raise InputError(
        f"{folder} holds neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}: download the tokenizer "
        "into the model's folder, or make the first with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def tokenizer_files(folder: pathlib.Path) -> list[str]:
    """The names of a tokenizer's files that a folder has."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    templates = sorted(folder.glob(f"{_TEMPLATES}/*.jinja"))
    return names + [f"{_TEMPLATES}/{file.name}" for file in templates]


def require_rows(vocabulary: Vocabulary, rows: Any, folder: pathlib.Path) -> None:
    """Refuses tokens that were added to a tokenizer and have no row in the model's embedding.

    Args:
      vocabulary: The tokenizer.
      rows: The embedding's, by config.json.
      folder: The model's, for the error.

    Raises:
      InputError: There are such tokens. Where others are beyond the embedding too, it is another
        model's tokenizer, of which the model's settings are told.
    """
    if not isinstance(rows, int) or not isinstance(vocabulary, HuggingFaceVocabulary):
        return
    beyond = vocabulary.added_tokens_from(rows)
    if beyond and len(beyond) == vocabulary.base_size - rows:
        names = ", ".join(map(repr, beyond[:8]))
        tokens = "an added token" if len(beyond) == 1 else f"{len(beyond)} added tokens"
        raise InputError(
            f"{folder / TOKENIZER_FILE} has {tokens} ({names}) beyond the {rows:,} rows of the "
            f"model's embedding, which end at the id {rows - 1}: take what is too much out of its "
            "added_tokens, or give the model rows for all with transformers, "
            f"model.resize_token_embeddings({vocabulary.base_size}), and save it."
        )


def end_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """The ids that end a model's answer, by what generation stops with; none where nothing says.

    A chat ends with another token than a document (Llama 3's <|eot_id|>).
    """
    for name in (GENERATION_FILE, "config.json"):
        found = settings_of(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        ids = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
        if ids:
            return tuple(ids)
    return ()


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Copies a tokenizer's files as they are; gives their names, none where there are none.

    Args:
      source: Where from; it need not exist.
      folder: Where to; it is made.
    """
    names = tokenizer_files(source)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as original, whole_file(folder / name) as copy:
            shutil.copyfileobj(original, copy)
    return names


def settle_generation(folder: pathlib.Path, tokens: Mapping[str, int]) -> int | list[int]:
    """Makes a folder's generation_config.json agree with what a model starts and stops with.

    Args:
      folder: The folder of a model; without such a file nothing is done.
      tokens: Of the model: "eos_token_id" and "bos_token_id".

    Returns:
      The ids that end a text: the file's if the model's is one of them.
    """
    eos = tokens["eos_token_id"]
    if not (settings := settings_of(folder / GENERATION_FILE)):
        return eos
    theirs = settings.get("eos_token_id")
    ids = theirs if isinstance(theirs, list) else [theirs]
    settled = {**settings, **tokens, "eos_token_id": theirs if eos in ids else eos}
    if settled != settings:
        write_text(folder / GENERATION_FILE, json.dumps(settled, indent=2) + "\n")
    ends: int | list[int] = settled["eos_token_id"]
    return ends


def write_tokenizer(vocabulary: Vocabulary, folder: pathlib.Path) -> list[str]:
    """Writes a vocabulary as transformers reads it.

    Args:
      vocabulary: The vocabulary.
      folder: Where to; it must exist.

    Returns:
      The names of the files; none for a vocabulary that transformers has no tokenizer for.
    """
    if isinstance(vocabulary, HuggingFaceVocabulary | SentencePieceVocabulary):
        settings: dict[str, Any] = {
            "eos_token": vocabulary.token(vocabulary.eos_id),
            "bos_token": vocabulary.token(vocabulary.start_id),
            "pad_token": vocabulary.token(vocabulary.pad_id),
            "clean_up_tokenization_spaces": False,
        }
    if isinstance(vocabulary, HuggingFaceVocabulary):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        with whole_file(folder / TOKENIZER_FILE) as file:
            file.write(vocabulary.model_bytes())
        write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        return [TOKENIZER_FILE, SETTINGS_FILE]
    if isinstance(vocabulary, SentencePieceVocabulary):
        with whole_file(folder / SENTENCEPIECE_FILE) as file:
            file.write(vocabulary.model_bytes())
        # By the model's own class transformers would add special tokens of that class.
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}
        settings["unk_token"] = vocabulary.token(vocabulary.unknown_id)
        first = vocabulary.token(vocabulary.encode("a")[0])
        settings["add_prefix_space"] = first.startswith(_SPACE)
        write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        return [SENTENCEPIECE_FILE, SETTINGS_FILE]
    return []


def _sentencepiece(folder: pathlib.Path) -> Vocabulary:
    """A SentencePiece model, as transformers reads it where it would give other ids."""
    path, settings = folder / SENTENCEPIECE_FILE, _class_settings(folder)
    vocabulary = SentencePieceVocabulary(path)
    adds_space = vocabulary.token(vocabulary.encode("a")[0]).startswith(_SPACE)
    if class_name(settings) not in ("LlamaTokenizer", "GemmaTokenizer") or (
        not adds_space and settings.get("add_prefix_space") is False
    ):
        return vocabulary
    return HuggingFaceVocabulary(
        path,
        eos_token=vocabulary.token(vocabulary.eos_id),
        pad_token=vocabulary.token(vocabulary.pad_id),
        start_token=vocabulary.token(vocabulary.start_id),
        model=from_sentencepiece(path.read_bytes(), settings),
    )


def _class_settings(folder: pathlib.Path) -> dict[str, Any]:
    """What transformers chooses a tokenizer's class by, and what that class is given."""
    config = settings_of(folder / "config.json")
    names = ("model_type", "tokenizer_class")
    chosen = {name: config[name] for name in names if config.get(name)}
    return {**chosen, **settings_of(folder / SETTINGS_FILE)}


def _hugging_face(folder: pathlib.Path, eos_token: str | None) -> Vocabulary:
    path = folder / TOKENIZER_FILE
    model = path.read_bytes()
    tokenizer = load_tokenizer(model, path)
    _require_ids(renumbered_tokens(model, tokenizer), path)
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
        model=as_transformers_reads(model, path, _class_settings(folder)),
    )


def _require_ids(moved: Mapping[str, tuple[int, int]], path: pathlib.Path) -> None:
    """Refuses a tokenizer whose tokens have other ids than those that the model knows them by."""
    if moved:
        token, (written, read) = next(iter(moved.items()))
        raise InputError(
            f"{path} gives the added token {token!r} the id {written}, and tokenizers reads it as "
            f"{read}, since it numbers added tokens in their order and without gaps: put its "
            "added_tokens in the order of their ids, with a token for each id between, or each "
            "into its vocab."
        )


def _special_token(folder: pathlib.Path, kind: str, ids: Mapping[str, int]) -> str | None:
    """The eos, bos or pad token, by name where a file has it, else by the id that it has."""
    for name in (SETTINGS_FILE, "special_tokens_map.json"):
        token = settings_of(folder / name).get(f"{kind}_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str) and (token in ids or kind == "eos"):
            return token
    for name in (GENERATION_FILE, "config.json"):
        token_id = settings_of(folder / name).get(f"{kind}_token_id")
        if isinstance(token_id, list) and len(token_id) == 1:
            token_id = token_id[0]
        for token, its_id in ids.items():
            if its_id == token_id:
                return token
    return None


def settings_of(file: pathlib.Path) -> dict[str, Any]:
    """A file of a tokenizer's settings; nothing where there is none."""
    return read_json_object(file, DOWNLOAD) if file.is_file() else {}
