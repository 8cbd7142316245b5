"""A run that does not fit in; the settings that make it fit, tried by compiling, out.

Tried in this order for a stage that does not fit, each alone and then all together, until it does:

    microbatches            twice as many, and again, while the batch can be split so; gradients are
                            the same, matrix products get smaller
    LossConfig.chunk_tokens a half, a quarter, an eighth
    DecoderConfig.remat     minimal to full (models/remat.py): the backward pass computes more again
    MeshConfig              all devices along fsdp: parameters and optimizer over all of them; with
                            fewer microbatches where more devices leave a batch too small for them

Microbatches are a stage's own; the others hold for the run, so what one stage takes of them the
other is compiled with too.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from salt_jax.planning.compile import CompiledStage, Job, TooLarge, largest_microbatches
from salt_jax.planning.topologies import GIB, Topology
from salt_jax.training import partitioning

Compile = Callable[[Job, Topology, int], CompiledStage | TooLarge]
_LEAST_CHUNK = 64
# From what keeps most to what keeps least (models/remat.py).
_REMAT = ("none", "minimal", "attention", "attention_output", "full")


class Change(NamedTuple):
    """Settings to change and what comes of it.

    Attributes:
      settings: New values by the settings' names.
      job: The job with them.
    """

    settings: Mapping[str, Any]
    job: Job

    @property
    def flags(self) -> str:
        """The settings as flags of `salt train`."""
        own = "config.Devices."
        return shlex.join(
            f"--{name.removeprefix(own) if name.startswith(own) else f'gin.{name}'}={value!r}"
            for name, value in self.settings.items()
        )


class Fit(NamedTuple):
    """A change with which every stage fits.

    Attributes:
      change: What to change.
      stages: The stages with it, by number.
    """

    change: Change
    stages: Mapping[int, CompiledStage | TooLarge]


def fits(compiled: CompiledStage | TooLarge, topology: Topology) -> bool | None:
    """Whether a stage compiled and its peak is within the device's memory; None: not known."""
    if isinstance(compiled, TooLarge):
        return False
    limit = topology.chip.hbm_gib
    return None if limit is None else compiled.memory.peak <= limit * GIB


def find_change(
    job: Job,
    topology: Topology,
    stages: Mapping[int, CompiledStage | TooLarge],
    compile_stage: Compile,
    tried: Callable[[int, Change, CompiledStage | TooLarge], None],
) -> Fit | None:
    """The first settings with which all stages fit, None where none of those tried do.

    Args:
      job: What does not fit.
      topology: The devices.
      stages: Its stages by number, as they compiled.
      compile_stage: What compiles a stage.
      tried: Told of every attempt: the stage, the change, what came of it.
    """
    change, compiled = Change({}, job), dict(stages)
    while failing := [stage for stage in compiled if fits(compiled[stage], topology) is False]:
        stage = failing[0]
        for candidate in candidates(change, topology, stage):
            outcome = compile_stage(candidate.job, topology, stage)
            tried(stage, candidate, outcome)
            if fits(outcome, topology):
                break
        else:
            return None
        for other in compiled.keys() - {stage}:
            if _shared(candidate) != _shared(change):
                compiled[other] = compile_stage(candidate.job, topology, other)
        change, compiled[stage] = candidate, outcome
    return Fit(change, compiled)


def candidates(start: Change, topology: Topology, stage: int) -> Iterator[Change]:
    """The changes to try for a stage, 1 or 2, on top of those already made, in order."""
    kinds = (_microbatches, _chunks, _remat, _mesh)
    for options in kinds:
        yield from options(start, topology, stage)
    together, combined = start, 0
    for options in kinds:
        stronger = list(options(together, topology, stage))
        if stronger:
            together, combined = stronger[-1], combined + 1
            if combined > 1:
                yield together


def _shared(change: Change) -> dict[str, Any]:
    """The settings that hold for both stages."""
    return {name: v for name, v in change.settings.items() if not name.endswith("microbatches")}


def _microbatches(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    job = change.job
    most = largest_microbatches(job, topology)
    parts = 2 * job.microbatches_of(stage)
    while parts <= most:
        if most % parts == 0:
            fields = {"stage1_microbatches" if stage == 1 else "microbatches": parts}
            if stage == 2 and job.has_stage1:
                # Not set, it would follow.
                fields = {"stage1_microbatches": job.stage1_microbatches, **fields}
            settings = {f"config.Devices.{name}": value for name, value in fields.items()}
            split: Job = dataclasses.replace(job, **cast(Any, fields))
            yield Change({**change.settings, **settings}, split)
        parts *= 2


def _chunks(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    del topology, stage
    loss = change.job.loss
    for divisor in (2, 4, 8):
        tokens = loss.chunk_tokens // divisor
        if tokens >= _LEAST_CHUNK:
            smaller = dataclasses.replace(loss, chunk_tokens=tokens)
            yield _changed(change, "losses.LossConfig.chunk_tokens", tokens, loss=smaller)


def _remat(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    del topology, stage
    model = change.job.model
    if model.remat not in _REMAT:
        stronger: tuple[str, ...] = _REMAT[-1:]
    else:
        stronger = _REMAT[_REMAT.index(model.remat) + 1 :]
    for remat in stronger:
        recomputing = dataclasses.replace(model, remat=remat)
        yield _changed(change, "decoder.DecoderConfig.remat", remat, model=recomputing)


def _mesh(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    del stage  # the mesh is both stages', and so must be their batches
    slices = topology.slices
    mesh = partitioning.MeshConfig(slice=slices, data=1, fsdp=-1, tensor=1)
    before = change.job.mesh.make(topology.devices).shape
    if dict(before) == dict(mesh.make(topology.devices).shape):
        return
    job = dataclasses.replace(change.job, mesh=mesh)
    rows, rest = divmod(job.batch_size, partitioning.batch_divisor(mesh.make(topology.devices)))
    if rest:
        return
    names = zip(partitioning.MESH_AXES, mesh.sizes(), strict=True)
    settings: dict[str, Any] = {f"partitioning.MeshConfig.{axis}": size for axis, size in names}
    parts = {
        "stage1_microbatches": _most_parts(rows, job.stage1_microbatches),
        "microbatches": _most_parts(rows, job.microbatches),
    }
    if parts != {name: getattr(job, name) for name in parts}:
        job = dataclasses.replace(job, **cast(Any, parts))
        settings |= {f"config.Devices.{name}": value for name, value in parts.items()}
    yield Change({**change.settings, **settings}, job)


def _most_parts(rows: int, parts: int) -> int:
    """The most equal parts, at most `parts`, of a device's rows."""
    return next(most for most in range(parts, 0, -1) if rows % most == 0)


def _changed(change: Change, name: str, value: Any, **fields: Any) -> Change:
    job = dataclasses.replace(change.job, **fields)
    return Change({**change.settings, name: value}, job)
