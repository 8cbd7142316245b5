"""Searches for settings that make a run fit, or that use its idle memory, by compiling with them.

For a stage that does not fit these are tried in order, first alone and then together:

    microbatches            twice as many, repeatedly, while the batch can be split; gradients stay
                            the same, matrix products get smaller
    LossConfig.chunk_tokens a half, a quarter, an eighth
    DecoderConfig.remat     minimal to full (models/remat.py): the backward pass recomputes more
    MeshConfig              all devices along fsdp, which shards parameters and optimizer state over
                            all of them; with fewer microbatches if the batch is too small otherwise

Microbatches are set for each stage; the other settings for the run, so the other stage is compiled
with them, too.

For a run that fits, the reverse of the first three: what uses more memory and is estimated to be
faster. A change is compiled only if the memory that it adds is predicted to fit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from salt_jax.planning.compile import Job, loss_bytes
from salt_jax.planning.stage_plan import StagePlan
from salt_jax.planning.topologies import GIB, Topology
from salt_jax.training import partitioning

Plan = Callable[[Job, Topology, int], StagePlan]
Tried = Callable[["Change", StagePlan], None]

_LEAST_CHUNK = 64
_LEAST_GAIN = 0.01  # the least share of a run's time that makes a change worthwhile
# The policies of models/remat.py from the one that keeps most to the one that keeps least.
_REMAT = ("none", "minimal", "attention", "attention_output", "full")
# What the backward pass keeps per token and block: D, H·K, G·K and F (twice for a gated MLP).
_KEPT = {"minimal": (2, 2, 2, 1), "attention": (2, 2, 2, 0), "attention_output": (1, 1, 0, 0)}

# The path of each setting in TrainConfig.
_MICROBATCHES, _STAGE1 = "config.Devices.microbatches", "config.Devices.stage1_microbatches"
_CHUNK, _POLICY = "losses.LossConfig.chunk_tokens", "decoder.DecoderConfig.remat"
_PATHS: Mapping[str, tuple[str, ...]] = {
    _MICROBATCHES: ("devices", "microbatches"),
    _STAGE1: ("devices", "stage1_microbatches"),
    _CHUNK: ("method", "loss", "chunk_tokens"),
    _POLICY: ("model", "remat"),
    **{
        f"partitioning.MeshConfig.{axis}": ("devices", "mesh", axis)
        for axis in partitioning.MESH_AXES
    },
}


class Change(NamedTuple):
    """New values of settings, by name, and the job with them."""

    settings: Mapping[str, Any]
    job: Job

    @property
    def flags(self) -> str:
        """The settings as flags of `salt train`, quoted for a shell."""
        flags = (f"--gin.{name}={value!r}" for name, value in self.settings.items())
        short = (flag.replace("--gin.config.Devices.", "--") for flag in flags)
        return " ".join(f'"{flag}"' if "'" in flag else flag for flag in short)

    def of(self, settings: Mapping[str, Any]) -> "Change":
        """This change and more settings."""
        values = {_PATHS[name]: value for name, value in settings.items()}
        job = dataclasses.replace(self.job, config=_replaced(self.job.config, values))
        return Change({**self.settings, **settings}, job)


class Found(NamedTuple):
    """A change with which every stage fits, and the stages with it by number."""

    change: Change
    stages: Mapping[int, StagePlan]


def find_fit(stages: Mapping[int, StagePlan], plan_stage: Plan, tried: Tried) -> Found | None:
    """The first change with which all stages fit, or None.

    Args:
      stages: The stages of a run on a topology, by number; some don't fit.
      plan_stage: Compiles a stage and measures it.
      tried: Called with every attempt.
    """
    change, planned = Change({}, stages[2].job), dict(stages)
    topology = stages[2].topology
    while failing := [stage for stage in planned if planned[stage].fits is False]:
        stage = failing[0]
        for candidate in candidates(change, topology, stage):
            outcome = plan_stage(candidate.job, topology, stage)
            tried(candidate, outcome)
            if outcome.fits:
                break
        else:
            return None
        for other in planned.keys() - {stage}:
            if _shared(candidate) != _shared(change):
                planned[other] = plan_stage(candidate.job, topology, other)
        change, planned[stage] = candidate, outcome
    return Found(change, planned)


def find_faster(stages: Mapping[int, StagePlan], plan_stage: Plan, tried: Tried) -> Found | None:
    """Settings that use idle memory and are estimated to make the run faster, or None.

    Args:
      stages: The stages of a run on a topology, by number; all fit.
      plan_stage: Compiles a stage and measures it.
      tried: Called with every attempt.
    """
    found = Found(Change({}, stages[2].job), stages)
    for options, helps in (
        (_weaker_remat, {"compute", "memory"}),
        (_fewer_microbatches, {"memory", "overlapped", "waited"}),
        (_larger_chunks, {"memory"}),
    ):
        for candidate in options(found.change, stages[2].topology):
            if not helps & _limits(found.stages) or not _can_fit(candidate.job, found.stages):
                continue
            planned: dict[int, StagePlan] = {}
            for stage in sorted(stages, key=lambda stage: -_steps(candidate.job, stage)):
                planned[stage] = plan_stage(candidate.job, stages[2].topology, stage)
                tried(candidate, planned[stage])
                if not planned[stage].fits:
                    break
            else:
                if _seconds(planned) < (1 - _LEAST_GAIN) * _seconds(found.stages):
                    found = Found(candidate, planned)
                break  # the others of this kind keep less, and gain less
    return found if found.change.settings else None


def candidates(start: Change, topology: Topology, stage: int) -> Iterator[Change]:
    """The changes to try, in order, for a stage that does not fit, on top of those in `start`."""
    kinds = (_more_microbatches, _smaller_chunks, _stronger_remat, _all_along_fsdp)
    for options in kinds:
        yield from options(start, topology, stage)
    together, combined = start, 0
    for options in kinds:
        if stronger := list(options(together, topology, stage)):
            together, combined = stronger[-1], combined + 1
            if combined > 1:
                yield together


def _shared(change: Change) -> dict[str, Any]:
    """The settings that apply to both stages."""
    return {name: v for name, v in change.settings.items() if not name.endswith("microbatches")}


def _more_microbatches(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    job = change.job
    most = job.config.data.batch_size // partitioning.batch_divisor(job.mesh(topology))
    parts = 2 * job.microbatches_of(stage)
    while parts <= most:
        if most % parts == 0 and stage == 1:
            yield change.of({_STAGE1: parts})
        elif most % parts == 0:
            # Stage 1's would follow if they were not set.
            own = {_STAGE1: job.microbatches_of(1)} if 1 in job.stages else {}
            yield change.of({**own, _MICROBATCHES: parts})
        parts *= 2


def _smaller_chunks(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    del topology, stage
    for divisor in (2, 4, 8):
        tokens = change.job.config.method.loss.chunk_tokens // divisor
        if tokens >= _LEAST_CHUNK:
            yield change.of({_CHUNK: tokens})


def _stronger_remat(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    del topology, stage
    remat = change.job.student.remat
    stronger = _REMAT[_REMAT.index(remat) + 1 :] if remat in _REMAT else _REMAT[-1:]
    yield from (change.of({_POLICY: policy}) for policy in stronger)


def _all_along_fsdp(change: Change, topology: Topology, stage: int) -> Iterator[Change]:
    del stage  # the mesh is both stages', and so must be their batches
    job = change.job
    mesh = partitioning.MeshConfig(slice=job.mesh(topology).shape["slice"], data=1)
    made = mesh.make(topology.devices)
    rows, rest = divmod(job.config.data.batch_size, partitioning.batch_divisor(made))
    if rest or dict(job.mesh(topology).shape) == dict(made.shape):
        return
    names = zip(partitioning.MESH_AXES, mesh.sizes(), strict=True)
    settings: dict[str, Any] = {f"partitioning.MeshConfig.{axis}": size for axis, size in names}
    parts = {stage: job.microbatches_of(stage) for stage in (1, 2)}
    # The largest number of equal parts of a device's rows, up to the present one.
    equal = {
        stage: max(p for p in range(1, now + 1) if rows % p == 0) for stage, now in parts.items()
    }
    if equal != parts:
        settings |= {_STAGE1: equal[1], _MICROBATCHES: equal[2]}
    yield change.of(settings)


def _weaker_remat(change: Change, topology: Topology) -> Iterator[Change]:
    del topology
    remat = change.job.student.remat
    weaker = _REMAT[1 : _REMAT.index(remat)] if remat in _REMAT else ()
    yield from (change.of({_POLICY: policy}) for policy in weaker)


def _fewer_microbatches(change: Change, topology: Topology) -> Iterator[Change]:
    del topology
    parts = {stage: change.job.microbatches_of(stage) for stage in change.job.stages}
    for most in range(1, max(parts.values())):
        if all(now % most == 0 or now < most for now in parts.values()):
            fewer = {stage: min(now, most) for stage, now in parts.items()}
            own = {_STAGE1: fewer[1]} if 1 in fewer else {}
            yield change.of({**own, _MICROBATCHES: fewer[2]})


def _larger_chunks(change: Change, topology: Topology) -> Iterator[Change]:
    job = change.job
    parts = max(job.microbatches_of(stage) for stage in job.stages)
    most = job.tokens // (partitioning.batch_divisor(job.mesh(topology)) * parts)
    for factor in (8, 4, 2):
        tokens = factor * job.config.method.loss.chunk_tokens
        if tokens <= most:
            yield change.of({_CHUNK: tokens})


def _limits(stages: Mapping[int, StagePlan]) -> set[str]:
    """The parts of the roofline that limit a step's time in any stage."""
    limits = set()
    for plan in stages.values():
        if plan.cost and plan.cost.seconds:
            parts = dict(plan.cost.seconds)
            if parts.pop("waited") > _LEAST_GAIN * max(parts.values()):
                limits.add("waited")
            limits.add(max(parts, key=lambda name: parts[name]))
    return limits


def _can_fit(job: Job, stages: Mapping[int, StagePlan]) -> bool:
    """Whether a job is predicted to fit, given the stages of one that does."""
    for stage, now in stages.items():
        limit, needed = now.topology.chip.hbm_gib, now.compiled.needed_gib
        if limit is None or needed is None or now.step_seconds is None:
            return False
        more = _kept_bytes(job, now.topology, stage) - _kept_bytes(now.job, now.topology, stage)
        if needed + more / GIB > limit:
            return False
    return True


def _kept_bytes(job: Job, topology: Topology, stage: int) -> float:
    """Estimated bytes on a device of what the backward pass keeps, and of the loss."""
    model, mesh = job.student, job.mesh(topology)
    tokens = job.tokens / partitioning.batch_divisor(mesh) / job.microbatches_of(stage)
    inputs, heads, kv_heads, hidden = _KEPT.get(model.remat, (1, 0, 0, 0))
    split = (
        heads * model.num_heads * model.head_width + kv_heads * model.kv_heads * model.head_width
    )
    split += hidden * model.mlp_dim * (2 if model.gated_mlp else 1)
    numbers = inputs * model.embed_dim + split / mesh.shape["tensor"]
    itemsize = jax.numpy.dtype(model.dtype).itemsize
    return model.num_layers * tokens * numbers * itemsize + loss_bytes(job, stage, mesh)


def _steps(job: Job, stage: int) -> int:
    distilling = job.config.stage1_steps
    return distilling if stage == 1 else job.config.steps - distilling


def _seconds(stages: Mapping[int, StagePlan]) -> float:
    """A run's estimated time; the estimates of all stages must be known."""
    return sum(_steps(s.job, number) * (s.step_seconds or 0.0) for number, s in stages.items())


def _replaced(settings: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    """Frozen settings with new values by path of field names."""
    fields = {}
    for name in {path[0] for path in values}:
        below = {path[1:]: value for path, value in values.items() if path[0] == name}
        fields[name] = below[()] if () in below else _replaced(getattr(settings, name), below)
    return dataclasses.replace(settings, **fields)
