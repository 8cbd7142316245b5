"""Resolves "hf:OWNER/NAME@REVISION", a model of the Hub, wherever a run's folder is accepted."""

import os
import pathlib

from filelock import FileLock

from salt_jax.cli.verb_process import run_verb
from salt_jax.huggingface import hub
from salt_jax.runtime.processes import FLAGS
from salt_jax.storage.run_folder import SUMMARY_FILE
from salt_jax.storage.user_folders import cache_folder

# Environment variable: the folder of imported models, ~/.cache/salt_models by default.
FOLDER = "SALT_MODELS"


def local_model(name: str) -> str:
    """The run folder of a model. One of the Hub ("hf:HuggingFaceTB/SmolLM2-135M") is imported once
    per commit; any other name is returned unchanged. InputError as `hub.download` or `salt
    convert`."""
    named = hub.split_name(name)
    if named is None:
        return name
    snapshot = hub.download(*named)
    folder = pathlib.Path(os.environ.get(FOLDER) or cache_folder("salt_models", FOLDER))
    run = folder / f"{named[0].replace('/', '--')}@{snapshot.name[:12]}"
    if (run / SUMMARY_FILE).exists():
        return str(run)  # perhaps in a folder that cannot be written
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{run}.lock"):  # several processes of one machine may want it
        if not (run / SUMMARY_FILE).exists():
            # It runs in one process, and without the devices that this one may have taken.
            alone = {f"SALT_{flag.upper()}": "" for flag in FLAGS} | {"JAX_PLATFORMS": "cpu"}
            run_verb("convert", [f"--huggingface={snapshot}"], run, alone)
    return str(run)
