"""A run that continues another one's stage 1: `salt train --fork_from=TRUNK`.

The trunk's newest checkpoint that lies in stage 1 of both runs is copied into the fork's folder,
with the metrics up to it, and the fork resumes from there. Their settings agree in all that changes
results but n_kd, so that the fork is bit for bit the run that trains all of its steps itself; its
costs, too, are that run's.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from salt_jax.distill.schedules import Step
from salt_jax.errors import InputError
from salt_jax.storage.buckets import RemoteFolder, is_remote, path_of
from salt_jax.storage.durable_files import link_or_copy, write_text
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.run_folder import (
    CHECKPOINTS_FOLDER,
    FORK_FILE,
    METRICS_FILE,
    UNFINISHED_CHECKPOINT,
    RunFolder,
    to_json,
)
from salt_jax.terminal import say
from salt_jax.training.checkpoint_digests import COMMIT_MARK
from salt_jax.training.checkpoints import checkpoints_of, complete_steps, read_progress
from salt_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Fork:
    """A checkpoint of another run to start from.

    Attributes:
      trunk: The other run's folder, on disk or in a bucket.
      step: The checkpoint's step.
    """

    trunk: pathlib.Path
    step: int

    def copy_into(self, run: RunFolder) -> None:
        """Copies the metrics and then the checkpoint, and notes in FORK_FILE the train FLOPs that
        the fork saves; all processes must call it."""
        counters = read_progress(self.trunk, self.step)["counters"]
        saved = counters["student_flops"] + counters["teacher_flops"]
        facts = {"trunk": os.fspath(self.trunk), "step": self.step, "saved_flops": saved}
        run.processes.require_same(fork=f"step {self.step} of {self.trunk}")
        if run.processes.is_first:
            text = (self.trunk / METRICS_FILE).read_text(encoding="utf-8")
            lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
            kept = (line for line in lines if json.loads(line)["step"] <= self.step)
            write_text(run.path / METRICS_FILE, "".join(kept))
            write_text(run.path / FORK_FILE, to_json(facts, indent=2))
            self._copy_checkpoint(checkpoints_of(run.path) / str(self.step))
        run.processes.wait("forked")
        say(f"It starts from step {self.step} of {self.trunk}, which saves {saved:.3g} train FLOPs")

    def _copy_checkpoint(self, target: pathlib.Path) -> None:
        trunk = self.trunk
        if is_remote(trunk):
            own = f"{CHECKPOINTS_FOLDER}/{self.step}/"
            trunk = local_folder(os.fspath(trunk), lambda name: name.startswith(own))
        source = checkpoints_of(trunk) / str(self.step)
        if is_remote(target):
            names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
            RemoteFolder(os.fspath(target)).put(source, names)
            write_text(target / COMMIT_MARK, "")
            return
        temporary = target.with_name(f"{self.step}{UNFINISHED_CHECKPOINT}-fork")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary, copy_function=link_or_copy)
        temporary.rename(target)


def find_fork(config: TrainConfig, run: RunFolder, may_differ: Collection[str]) -> Fork | None:
    """Where the run is forked from; None for a run that isn't, or has checkpoints of its own.

    Args:
      config: The settings.
      run: The fork's folder.
      may_differ: The settings in which the two runs may differ.

    Raises:
      InputError: The trunk is not a run with checkpoints, has other settings, or no checkpoint up
        to n_kd.
    """
    if config.fork_from is None:
        return None
    given = f"fork_from is {config.fork_from}"
    if path_of(config.fork_from).resolve() == run.path.resolve():
        raise InputError(f"{given}, the output folder itself: name another run.")
    if complete_steps(run.path):
        return None
    trunk = path_of(config.fork_from)
    there = dataclasses.replace(run, path=trunk)
    steps = complete_steps(trunk)
    if not there.begun or not steps:
        raise InputError(
            f"{given}, which is not the output folder of a `salt train` with a checkpoint: name "
            "one, or leave it unset."
        )
    _, refused = there.differences(may_differ)
    if refused:
        raise InputError(
            f"{given}, a run with other settings ({'; '.join(refused[:2])}): only n_kd may differ; "
            "give both the same, or leave fork_from unset."
        )
    saved = read_progress(trunk, steps[-1])["schedule"]["Step"]
    return Fork(trunk, _newest_fitting(config, steps, saved["n_kd"]))


def check_fork(settings: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a fork of a run that will keep no checkpoint for it.

    Args:
      settings: Those of `salt train`.
      earlier: Those of the runs that are trained before it, by output folder.

    Raises:
      InputError: The trunk is one of them, and keeps no step up to n_kd.
    """
    config: TrainConfig = settings["config"]
    if config.fork_from is None or config.fork_from not in earlier:
        return
    trunk: TrainConfig = earlier[config.fork_from]["config"]
    saving, schedule = trunk.checkpoints, trunk.method.schedule
    saved = [step for step in range(1, trunk.steps + 1) if saving.saves(step, trunk.steps)]
    kept = {*filter(saving.keeps, saved), *saved[-saving.keep_last :]}
    if isinstance(schedule, Step):
        _newest_fitting(config, sorted(kept), schedule.n_kd)


def _newest_fitting(config: TrainConfig, steps: Sequence[int], n_kd: int) -> int:
    """The newest of a trunk's checkpoints that lies in stage 1 of both; the trunk's n_kd is
    given."""
    own = config.method.schedule
    assert isinstance(own, Step), "TrainConfig refuses the others"
    # A trunk that has ended its stage 1 has no projection (LET) in its checkpoints.
    last = min(own.n_kd, n_kd - (config.method.alignment is not None))
    fitting = [step for step in steps if step <= last]
    if not fitting:
        raise InputError(
            f"fork_from is {config.fork_from}, whose first checkpoint is of step {steps[0]}, past "
            f"{last}, the last one to fork from with n_kd {own.n_kd} here and {n_kd} there: keep "
            "an earlier one in that run (--keep_steps), or raise n_kd."
        )
    return fitting[-1]
