"""Refuses folders that are not a model in safetensors, and explains what they are instead."""

import pathlib
import re
from typing import NoReturn

from salt_jax.errors import InputError

CONFIG_FILE = "config.json"

_REPOSITORY = re.compile(
    r"(?:(?:https://)?huggingface\.co/|hf://)?([\w.-]+/[\w.-]+?)(?:/tree/.*)?/?"
)
_PICKLE = (
    "a pickle, which may run any code when it is read, and no safetensors: choose a revision of "
    "the model with safetensors, or make them where you trust the file, with transformers: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
_OTHER_FRAMEWORK = (
    "weights for TensorFlow or Flax, and no safetensors: choose a revision of the model with "
    "safetensors"
)
# Weights in other formats, by suffix.
_ADVICE = {
    ".gguf": "a GGUF file of llama.cpp's: name that file, --huggingface=FILE",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _PICKLE),
    **dict.fromkeys((".h5", ".msgpack"), _OTHER_FRAMEWORK),
}


def repository_id(name: str) -> str | None:
    """OWNER/NAME of a repository on the Hugging Face Hub, from that or from its address."""
    match = _REPOSITORY.fullmatch(name)
    return match[1] if match and not match[1].startswith(".") else None


def require_config(name: str, folder: pathlib.Path) -> None:
    """Refuses a folder without config.json, or with adapters, which transformers would apply, and
    says what it is instead if that can be told. `name` is the folder as typed."""
    is_model = (folder / CONFIG_FILE).is_file()
    if is_model and not (folder / "adapter_config.json").is_file():
        return
    if folder.is_file():
        if advice := other_formats([folder]):
            raise InputError(f"huggingface is {name!r}, {advice}.")
        raise InputError(
            f"huggingface is {name!r}, a file: name the folder that it is in, --huggingface=FOLDER."
        )
    if folder.is_dir():
        advice = other_formats(sorted(folder.iterdir()))
        if advice and (is_model or advice.startswith("adapter_")):
            raise InputError(f"huggingface is {name!r}, with {advice}.")
        if (folder / "checkpoints").is_dir():
            raise InputError(
                f"huggingface is {name!r}, a run of `salt`: other verbs take it as it is, and "
                f"--model={name} exports it."
            )
        # As in huggingface_hub's cache, or an unpacked archive.
        inner = sorted([*folder.glob(f"*/{CONFIG_FILE}"), *folder.glob(f"*/*/{CONFIG_FILE}")])
        if inner:
            raise InputError(
                f"huggingface is {name!r}, where there is no {CONFIG_FILE}, but there is one in "
                f"{inner[0].parent}: name that folder, --huggingface={inner[0].parent}."
            )
        if advice:
            raise InputError(f"huggingface is {name!r}, with {advice}.")
    raise InputError(
        f"huggingface is {name!r}, where there is no {CONFIG_FILE}: name the folder of a "
        "downloaded model, --huggingface=FOLDER."
    )


def refuse_without_safetensors(folder: pathlib.Path, expected: str) -> NoReturn:
    """Raises InputError with the reason why a folder has no readable weights; `expected` names the
    files it lacks."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name that of a downloaded model.")
    files = sorted(folder.iterdir())
    if advice := other_formats(files):
        raise InputError(f"{folder} has {advice}.")
    others = [file.name for file in files if file.suffix == ".safetensors"]
    if others:
        raise InputError(
            f"{folder} holds {others[0]} and neither {expected}: download the folder again, its "
            "index too."
        )
    raise InputError(f"{folder} holds neither {expected}: name the folder of a downloaded model.")


def other_formats(files: list[pathlib.Path]) -> str | None:
    """Advice about a file with weights in another format; None if there is no such file."""
    for file in files:
        if file.name.startswith("adapter_"):
            return (
                f"{file.name}, adapters (LoRA) that change another model: merge them into it with "
                "peft, AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
                ".save_pretrained(NEW_FOLDER), and name the new folder"
            )
    others = (f"{f.name}, {_ADVICE[f.suffix]}" for f in files if f.suffix in _ADVICE)
    return next(others, None)
