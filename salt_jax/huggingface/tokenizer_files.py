"""The files of a model's tokenizer, and the end tokens they name."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface.safetensors_files import DOWNLOAD
from salt_jax.storage.durable_files import whole_file, write_text
from salt_jax.storage.json_files import read_json_object

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"

# A tokenizer's files, and generation_config.json with the start and end tokens.
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE, SPECIAL_TOKENS_FILE),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", GENERATION_FILE),
)
_TEMPLATES = "additional_chat_templates"  # a folder of further templates by name

# The folder for these files in the run of an imported model, or of one that started from it.
TOKENIZER_FOLDER = "tokenizer"


def tokenizer_settings(file: pathlib.Path) -> dict[str, Any]:
    """The settings in a tokenizer's file; empty if there is no such file."""
    return read_json_object(file, DOWNLOAD) if file.is_file() else {}


def tokenizer_files(folder: pathlib.Path) -> list[str]:
    """The names of a tokenizer's files that a folder has."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    templates = sorted(folder.glob(f"{_TEMPLATES}/*.jinja"))
    return names + [f"{_TEMPLATES}/{file.name}" for file in templates]


def end_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """The ids that end a model's answer, by its generation settings; empty if they name none.

    A chat may end with another token than a document (Llama 3's <|eot_id|>).
    """
    for name in (GENERATION_FILE, "config.json"):
        found = tokenizer_settings(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        ids = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
        if ids:
            return tuple(ids)
    return ()


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Copies a tokenizer's files unchanged; returns their names."""
    names = tokenizer_files(source)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as original, whole_file(folder / name) as copy:
            shutil.copyfileobj(original, copy)
    return names


def settle_generation(folder: pathlib.Path, tokens: Mapping[str, int]) -> int | list[int]:
    """Updates a folder's generation_config.json, if any, to a model's "eos_token_id" and
    "bos_token_id"; returns the ids that end a text, the file's if the model's is among them."""
    eos = tokens["eos_token_id"]
    if not (settings := tokenizer_settings(folder / GENERATION_FILE)):
        return eos
    theirs = settings.get("eos_token_id")
    ends: int | list[int] = theirs if isinstance(theirs, list) and eos in theirs else eos
    settled = {**settings, **tokens, "eos_token_id": ends}
    if settled != settings:
        write_text(folder / GENERATION_FILE, json.dumps(settled, indent=2) + "\n")
    return ends
