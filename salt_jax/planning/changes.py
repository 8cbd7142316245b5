"""A stage that does not fit in; the settings that make it fit, tried by compiling, out.

Tried in this order, each alone and then all together, until one fits:

    microbatches            twice as many, and again, while the batch can be split so; gradients are
                            the same, matrix products get smaller
    LossConfig.chunk_tokens a half, a quarter, an eighth
    DecoderConfig.remat     minimal to full (models/remat.py): the backward pass computes more again
    MeshConfig              all devices along fsdp: parameters and optimizer over all of them
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
        flags = (f"--gin.{name}={value!r}" for name, value in self.settings.items())
        return shlex.join(flags)


class Fit(NamedTuple):
    """A change that makes a stage fit."""

    change: Change
    stage: CompiledStage


def fits(compiled: CompiledStage | TooLarge, topology: Topology) -> bool:
    """Whether a stage compiled and its peak is within the device's memory, where that is known."""
    if isinstance(compiled, TooLarge):
        return False
    limit = topology.chip.hbm_gib
    return limit is None or compiled.memory.peak <= limit * GIB


def find_change(
    job: Job,
    topology: Topology,
    stage: int,
    compile_stage: Compile,
    tried: Callable[[Change, CompiledStage | TooLarge], None],
) -> Fit | None:
    """The first change that makes a stage fit, None where none of them does.

    Args:
      job: What does not fit.
      topology: The devices.
      stage: 1 or 2.
      compile_stage: What compiles a stage.
      tried: Told of every attempt.
    """
    for change in candidates(job, topology, stage):
        compiled = compile_stage(change.job, topology, stage)
        tried(change, compiled)
        if not isinstance(compiled, TooLarge) and fits(compiled, topology):
            return Fit(change, compiled)
    return None


def candidates(job: Job, topology: Topology, stage: int) -> Iterator[Change]:
    """The changes to try for a stage, 1 or 2, in order."""
    kinds = (_microbatches, _chunks, _remat, _mesh)
    for options in kinds:
        yield from options(Change({}, job), topology, stage)
    together = Change({}, job)
    for options in kinds:
        for stronger in options(together, topology, stage):
            together = stronger
        if len(together.settings) > 1:
            yield together


def _microbatches(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    name = "stage1_microbatches" if stage == 1 else "microbatches"
    most = largest_microbatches(change.job, topology)
    parts = 2 * change.job.microbatches_of(stage)
    while parts <= most:
        if most % parts == 0:
            yield _changed(change, f"train.train.{name}", parts, **{name: parts})
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
    slices = topology.slices
    mesh = partitioning.MeshConfig(slice=slices, data=1, fsdp=-1, tensor=1)
    before = change.job.mesh.make(topology.devices).shape
    if dict(before) == dict(mesh.make(topology.devices).shape):
        return
    job = dataclasses.replace(change.job, mesh=mesh)
    divisor = partitioning.batch_divisor(mesh.make(topology.devices))
    if job.batch_size % (divisor * job.microbatches_of(stage)):
        return
    names = zip(partitioning.MESH_AXES, mesh.sizes(), strict=True)
    settings = {f"partitioning.MeshConfig.{axis}": size for axis, size in names}
    yield Change({**change.settings, **settings}, job)


def _changed(change: Change, name: str, value: Any, **fields: Any) -> Change:
    job = dataclasses.replace(change.job, **fields)
    return Change({**change.settings, name: value}, job)
