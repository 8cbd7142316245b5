"""What a folder, or a name, that is no downloaded model in safetensors is, and what to do about it.

In: what was named as a model of Hugging Face's. Out: nothing if it is one, else an error whose
advice fits: weights in another format, adapters, a run of `salt train`, the name of a repository.
"""

import pathlib
import re
from typing import NoReturn

from salt_jax.errors import InputError

CONFIG_FILE = "config.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_REPOSITORY = re.compile(
    r"(?:(?:https://)?huggingface\.co/|hf://)?([\w.-]+/[\w.-]+?)(?:/tree/.*)?/?"
)
_SAVED_AGAIN = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"


def repository_id(name: str) -> str | None:
    """OWNER/NAME of a repository of Hugging Face's, by that or by its address."""
    match = _REPOSITORY.fullmatch(name)
    return match[1] if match and not match[1].startswith(".") else None


def refuse_repository(name: str) -> None:
    """Refuses the name of a repository, if no folder has it.

    Raises:
      InputError: With the command that downloads it.
    """
    repository = repository_id(name)
    if repository is not None and not pathlib.Path(name).exists():
        raise InputError(
            f"huggingface is {name!r}, which is no folder here: name the folder of a downloaded "
            f"model; a repository of that name is downloaded with `hf download {repository} "
            '--include "*.json" "*.safetensors" "*.model" "*.jinja" "*.txt" '
            f"--local-dir {repository.rpartition('/')[2]}`, which comes with huggingface_hub."
        )


def require_config(name: str, folder: pathlib.Path) -> None:
    """Refuses what has no config.json, or adapters beside it, which transformers would apply.

    Args:
      name: The folder as it was typed.
      folder: Where it is on the disk.

    Raises:
      InputError: With what it is instead, as far as that can be told.
    """
    adapters = folder / "adapter_config.json"
    if (folder / CONFIG_FILE).is_file() and not adapters.is_file():
        return
    if folder.is_file():
        if advice := other_formats([folder]):
            raise InputError(f"huggingface is {name!r}, {advice}.")
        raise InputError(
            f"huggingface is {name!r}, a file: name the folder that it is in, --huggingface=FOLDER."
        )
    if folder.is_dir():
        if adapters.is_file():
            raise InputError(f"huggingface is {name!r}, with {other_formats([adapters])}.")
        if (folder / "checkpoints").is_dir():
            raise InputError(
                f"huggingface is {name!r}, a run of salt's: other verbs take it as it is, and "
                f"--model={name} gives it out."
            )
        # As in the cache of huggingface_hub, and where something was unpacked.
        inner = sorted([*folder.glob(f"*/{CONFIG_FILE}"), *folder.glob(f"*/*/{CONFIG_FILE}")])
        if inner:
            raise InputError(
                f"huggingface is {name!r}, where no {CONFIG_FILE} is, and there is one in "
                f"{inner[0].parent}: name that folder, --huggingface={inner[0].parent}."
            )
        if advice := other_formats(sorted(folder.iterdir())):
            raise InputError(f"huggingface is {name!r}, with {advice}.")
    raise InputError(
        f"huggingface is {name!r}, where no {CONFIG_FILE} is: name the folder of a downloaded "
        "model, --huggingface=FOLDER."
    )


def refuse_without_safetensors(folder: pathlib.Path, expected: str) -> NoReturn:
    """Says why a folder has no weights that can be read.

    Args:
      folder: The folder, which has none.
      expected: The names of the files it might have had.

    Raises:
      InputError: In any case.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name that of a downloaded model.")
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
    """A file that has weights in another way, and what to do about it; None where none has."""
    for file in files:
        if file.name.startswith("adapter_"):
            return (
                f"{file.name}, adapters (LoRA) that change another model: put them into it with "
                "peft, AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
                ".save_pretrained(NEW_FOLDER), and name the new folder"
            )
    for file in files:
        if file.suffix == ".gguf":
            return (
                f"{file.name}, a GGUF file of llama.cpp's, mostly with quantized weights: download "
                "the repository that it was made of, with config.json and safetensors"
            )
        if file.suffix in _PICKLES:
            return (
                f"{file.name}, a pickle, which may run any code when it is read, and no "
                "safetensors: take a revision of the model with safetensors, or make them where "
                f"you trust the file, with transformers: {_SAVED_AGAIN}"
            )
        if file.suffix in (".h5", ".msgpack"):
            return (
                f"{file.name}, weights for TensorFlow or Flax, and no safetensors: take a revision "
                "of the model with safetensors"
            )
    return None
