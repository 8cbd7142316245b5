"""Checkpoints in RUN/checkpoints/STEP/: when to save them, and the models in them.

Each has three items: `params`, `optimizer` (the rest of the TrainState) and `progress` (JSON:
model, vocabulary, data position, counters, teacher). A teacher or scorer is loaded from `params`
and `progress` alone. A step's folder is renamed to STEP only when it is complete.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary, load_vocabulary
from salt_jax.distill.schedules import Watched
from salt_jax.errors import InputError
from salt_jax.huggingface.tokenizer_files import TOKENIZER_FOLDER, end_ids
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.buckets import RemoteFolder, is_remote, path_of
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.json_files import read_json_object
from salt_jax.storage.local_copies import local_run, remote_steps
from salt_jax.storage.manifests import DIGESTS_FILE
from salt_jax.storage.run_folder import CHECKPOINTS_FOLDER
from salt_jax.training import partitioning
from salt_jax.training.checkpoint_digests import (
    COMMIT_MARK,
    check_together,
    is_committed,
    item_digest,
)
from salt_jax.training.checkpoint_items import reading, require_path, restore_arrays
from salt_jax.training.finite import require_finite
from salt_jax.training.train_state import StateLayout, abstract_sharded_params


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep. The last step is always saved.

    Attributes:
      save_every: Steps between checkpoints; 0 saves only keep_steps and the last step.
      save_minutes: Also saves after the first step once that many minutes have passed since the
        last save began, two steps later with several processes; 0: never.
      keep_last: How many of the newest to keep.
      keep_every: Also keep steps that are multiples of this; 0 keeps none.
      keep_steps: Steps that are always saved and kept (the scorer's early checkpoint, say).
      commit_by_file: Whether a checkpoint is complete once a file in it says so, as in gs://,
        rather than when its folder is renamed: for mounts of buckets (gcsfuse, s3fs), on which
        that copies file by file.
    """

    save_every: int = 1000
    save_minutes: float = 0.0
    keep_last: int = 1
    keep_every: int = 0
    keep_steps: Sequence[int] = ()
    commit_by_file: bool = False

    def __post_init__(self) -> None:
        if self.save_every < 0 or self.keep_every < 0 or self.keep_last < 1:
            raise InputError(
                f"CheckpointConfig got save_every {self.save_every}, keep_every {self.keep_every} "
                f"and keep_last {self.keep_last}: the first two can't be negative, and keep_last "
                "must be at least 1."
            )
        if not 0 <= self.save_minutes < math.inf:
            raise InputError(
                f"CheckpointConfig.save_minutes is {self.save_minutes}: set it to the minutes from "
                "one save to the next, or to 0 to save by steps alone."
            )

    def saves(self, step: int, last_step: int) -> bool:
        """Whether to save after `step` of `last_step` steps."""
        regular = self.save_every > 0 and step % self.save_every == 0
        return regular or step in self.keep_steps or step == last_step

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept when there are newer ones."""
        return step in self.keep_steps or (self.keep_every > 0 and step % self.keep_every == 0)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model in a checkpoint, whose parameters are not loaded yet.

    Attributes:
      run_path: The run's folder, on disk or in gs://.
      path: The same on disk; of one in gs:// a copy without its checkpoints.
      step: The checkpoint's step.
      config: The model.
      vocabulary_fingerprint: The fingerprint of the tokenizer that it was trained with.
      digest: SHA-256 of the checkpoint's parameter files.
      counters: The cost of its training so far (`ledger.Counters`); empty if unknown.
      url: The bucket's folder that `path` is a local copy of, or "".
    """

    run_path: pathlib.Path
    path: pathlib.Path
    step: int
    config: DecoderConfig
    vocabulary_fingerprint: str
    digest: str
    counters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    url: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """How manifests and checkpoints name this model."""
        return {"path": self.url or str(self.path), "step": self.step, "digest": self.digest}

    def load_vocabulary(self) -> Vocabulary:
        """The vocabulary kept beside the checkpoints.

        Raises:
          InputError: There is none, or it isn't the one that the model was trained with.
        """
        folder = self.path / VOCABULARY_FOLDER
        if not folder.exists():
            raise InputError(
                f"{self.path} has no {VOCABULARY_FOLDER}/: copy that folder into it from the cache "
                "that the model was trained on."
            )
        vocabulary = load_vocabulary(folder)
        if vocabulary.fingerprint != self.vocabulary_fingerprint:
            raise InputError(
                f"{folder} has the fingerprint {vocabulary.fingerprint[:12]} and the model was "
                f"trained with {self.vocabulary_fingerprint[:12]}: copy that folder of the cache "
                "that the model was trained on."
            )
        return vocabulary

    def end_ids(self) -> tuple[int, ...]:
        """The ids that end its answers, by the tokenizer's files; empty if they don't say."""
        ids = end_ids(self.path / TOKENIZER_FOLDER)
        return tuple(i for i in ids if i < self.config.padded_vocab_size)

    def load_params(
        self,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        dtype: Any = None,
    ) -> Any:
        """The parameters, sharded over `mesh`, in `dtype` or the dtype that they were saved in.

        Raises:
          InputError: They cannot be read, or are not all finite.
        """
        abstract = abstract_sharded_params(self.config, mesh, rules, dtype)
        folder = checkpoints_of(self.run_path) / str(self.step)
        with reading(folder):
            params = restore_arrays(folder / "params", abstract)
        require_finite(params, mesh, folder)
        return params


def find_model(
    path: str | pathlib.Path, step: int | None, role: str, cache: PackedCache | None = None
) -> SavedModel:
    """Finds a model in a run's folder.

    Args:
      path: The run's folder, or its URL in a bucket. A checkpoint in gs:// is read where it is, by
        each process its own shards; one in s3:// is copied.
      step: The checkpoint's step; None is the newest.
      role: What the model is for ("teacher"), for errors.
      cache: The cache to check it against, if any: the model must be able to read its rows. The
        cache's vocabulary may have more reserved ids than the model's.

    Raises:
      InputError: No such folder, no checkpoint in it, no such step, another vocabulary than the
        cache's, or rows longer than the model takes.
    """
    url = os.fspath(path) if is_remote(path) else ""
    flags = {"model": "--step", "teacher": "--teacher.step", "initial": "--initial.step"}
    flag = flags.get(role, f"--{role}_step")
    steps = remote_steps(RemoteFolder(url).files()) if url else []
    if not steps:
        path = _run_path(local_run(url) if url else path, role)
        steps = complete_steps(path)
    newest = steps[-1] if steps else -1
    if step is None:  # the first process's: others may have listed the run before or after a save
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest < 0:
        raise InputError(f"{role} is {path}, which has no complete checkpoint yet.")
    if step is None:
        step = newest
    elif step not in steps:
        raise InputError(
            f"{role} asks for step {step} of {path}, which has {', '.join(map(str, steps))}: "
            f"change {flag}."
        )
    path = local_run(url, step) if url else pathlib.Path(path)
    run_path = path_of(url) if url.startswith("gs://") else path
    require_path(run_path)
    progress = read_progress(run_path, step)
    model = SavedModel(
        run_path=run_path,
        path=path,
        step=step,
        # Attention for these devices, not those that it was trained on.
        config=dataclasses.replace(
            DecoderConfig.from_json(progress["model"]), attention_backend="auto"
        ),
        vocabulary_fingerprint=progress["vocabulary_fingerprint"],
        digest=check_together(checkpoints_of(run_path) / str(step), ("params",))[0],
        counters=progress.get("counters") or {},
        url=url,
    )
    if cache is not None:
        require_fit(model, cache, role)
    return model


def _run_path(path: str | pathlib.Path, role: str) -> pathlib.Path:
    """The run's folder, which has checkpoints."""
    name = "name the output folder of a `salt train` run"
    if not str(path):
        raise InputError(f"{role} is empty: {name}.")
    path = pathlib.Path(path)
    if (path / CHECKPOINTS_FOLDER).is_dir():
        return path
    if (path / "config.json").exists():
        raise InputError(
            f"{role} is {path}, a Hugging Face model: import it first, `salt convert "
            f"--huggingface={path} --output_dir=RUN`, and name that RUN."
        )
    if path.is_dir():
        raise InputError(f"{role} is {path}, which has no {CHECKPOINTS_FOLDER}: {name}.")
    found = "which is a file" if path.exists() else "which does not exist"
    raise InputError(f"{role} is {path}, {found}: {name}.")


def read_progress(path: pathlib.Path, step: int) -> dict[str, Any]:
    """A checkpoint's JSON item: model, cache, rows consumed, counters.

    Raises:
      InputError: The checkpoint is damaged.
    """
    folder = checkpoints_of(path) / str(step)
    item_digest(folder, "progress")
    with reading(folder), contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        progress: dict[str, Any] = handler.restore(folder / "progress")
    return progress


def watched_in(progress: Mapping[str, Any]) -> Watched:
    """What an adaptive schedule had seen when a checkpoint was saved."""
    return Watched(**progress.get("watched", {}))


def complete_steps(path: pathlib.Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending."""
    folder = path / CHECKPOINTS_FOLDER
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(int(p.name) for p in steps if is_committed(p))


def mark_sent(path: pathlib.Path) -> None:
    """Marks checkpoints that older versions sent to a bucket, digests.json last, as complete:
    Orbax removes those without its mark."""
    for step in remote_steps(files := RemoteFolder(os.fspath(path)).files()):
        folder = f"{CHECKPOINTS_FOLDER}/{step}"
        if f"{folder}/{COMMIT_MARK}" not in files:
            digests = read_json_object(path / folder / DIGESTS_FILE, "delete it")
            if all(f"{folder}/{name}" in files for name in digests):
                write_text(path / folder / COMMIT_MARK, "")


def checkpoints_of(path: pathlib.Path) -> pathlib.Path:
    """The absolute path of a run's checkpoints, on disk or in a bucket."""
    folder = path / CHECKPOINTS_FOLDER
    return folder if is_remote(folder) else folder.absolute()


def require_fit(
    model: SavedModel, cache: PackedCache, role: str, *, more_ids: bool = False
) -> None:
    """Refuses a cache whose rows a model cannot read.

    With `more_ids` the model's vocabulary, too, may have more reserved ids than the cache's.

    Raises:
      InputError: Rows longer than the model takes, or another vocabulary.
    """
    if cache.sequence_length > model.config.max_length:
        raise InputError(
            f"The cache {cache.path} has rows of {cache.sequence_length} tokens and the {role} "
            f"{model.path} takes {model.config.max_length}: prepare shorter rows."
        )
    if model.vocabulary_fingerprint != cache.vocabulary_fingerprint:
        # Rows on disk have no reserved ids, so a Pythia can read those of a UL2 run's cache.
        kept = (model.path / VOCABULARY_FOLDER).exists()
        own = model.load_vocabulary() if kept else None
        if own and (cache.vocabulary.extends(own) or (more_ids and own.extends(cache.vocabulary))):
            return
        raise InputError(
            f"The {role} {model.path} was trained with the vocabulary "
            f"{model.vocabulary_fingerprint[:12]} and the cache {cache.path} has "
            f"{cache.vocabulary_fingerprint[:12]}: use a cache prepared with the same vocabulary, "
            f"or another {role}."
        )


def state_bytes(layout: StateLayout) -> int:
    """The bytes of one checkpoint, before compression."""
    leaves = jax.tree.leaves(layout.abstract)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
