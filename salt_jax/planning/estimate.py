"""A compiled stage in; its FLOPs, its traffic and an estimate of its time, out. And of the run's.

FLOPs are analytic (training/flops.py), for all devices together: for each token 3 forward passes of
the student and, in stage 1, one of the teacher. Hardware FLOPs add what rematerialisation repeats.

The time is a roofline's, with the makers' peaks times what programs of this kind usually reach of
them. Work that overlaps counts as the longest of it, what does not is added:

    step = max(compute, memory, overlapped transfers) + transfers that the program waits for

No program was run: take it for comparing settings and topologies, not for a promise.
"""

import dataclasses
from collections.abc import Mapping

from salt_jax.planning import collectives, hlo, traffic
from salt_jax.planning.compile import Job
from salt_jax.planning.topologies import Chip
from salt_jax.training import flops

COMPUTE_FRACTION = 0.6  # of the peak, by matrix products and what lies between them
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.7


@dataclasses.dataclass(frozen=True)
class StageEstimate:
    """What a step of a stage costs.

    Attributes:
      flops: Model FLOPs of a step, all devices: what MFU counts.
      hardware_flops: The same with what is computed twice.
      memory_bytes: Main memory read and written by a device in a step.
      collective_bytes: Bytes that a device sends in a step, by kind.
      seconds: Parts of the roofline, by name: compute, memory, overlapped, waited.
    """

    flops: float
    hardware_flops: float
    memory_bytes: float
    collective_bytes: Mapping[str, float]
    seconds: Mapping[str, float] | None

    @property
    def step_seconds(self) -> float | None:
        """The roofline's time of a step; None for a device whose peaks are not known."""
        if self.seconds is None:
            return None
        overlapping = (self.seconds[name] for name in ("compute", "memory", "overlapped"))
        return max(overlapping) + self.seconds["waited"]


@dataclasses.dataclass(frozen=True)
class RunEstimate:
    """What a whole run costs, beside the same run without a teacher.

    Attributes:
      flops: Model FLOPs of all steps.
      baseline_flops: The same if all steps were plain.
      seconds: Of all steps, without compiling, evaluation and checkpoints; None if not known.
      baseline_seconds: The same if all steps were plain.
      chips: How many devices.
    """

    flops: float
    baseline_flops: float
    seconds: float | None
    baseline_seconds: float | None
    chips: int

    @property
    def overhead(self) -> float | None:
        """The share of time that the teacher adds: 0.03 is 3%."""
        if self.seconds is None or self.baseline_seconds is None:
            return None
        return self.seconds / self.baseline_seconds - 1

    def chip_hours(self, seconds: float | None) -> float | None:
        """Chips × hours of so many seconds."""
        return None if seconds is None else seconds * self.chips / 3600


def flops_per_step(job: Job, stage: int) -> float:
    """Model FLOPs of a step, all devices."""
    length = job.sequence_length
    per_token = flops.train_flops_per_token(job.model, length) + _teacher_flops(job, stage)
    return per_token * job.tokens


def hardware_flops_per_step(job: Job, stage: int) -> float:
    """The same with what rematerialisation computes twice."""
    length = job.sequence_length
    per_token = flops.hardware_train_flops_per_token(job.model, length) + _teacher_flops(job, stage)
    return per_token * job.tokens


def estimate_stage(
    job: Job, stage: int, chip: Chip, chips: int, module: hlo.Module
) -> StageEstimate:
    """What a step costs.

    Args:
      job: What the run computes.
      stage: 1 or 2.
      chip: What a device can do.
      chips: How many.
      module: The compiled program.
    """
    transfers = collectives.collectives(module)
    memory_bytes = traffic.memory_bytes(module)
    hardware_flops = hardware_flops_per_step(job, stage)
    seconds = None
    if chip.peak_flops and chip.memory_bandwidth and chip.link_bandwidth:
        link = LINK_FRACTION * chip.link_bandwidth
        sent = {
            overlaps: sum(t.sent_bytes * t.times for t in transfers if t.overlaps is overlaps)
            for overlaps in (True, False)
        }
        seconds = {
            "compute": hardware_flops / chips / (COMPUTE_FRACTION * chip.peak_flops),
            "memory": memory_bytes / (MEMORY_FRACTION * chip.memory_bandwidth),
            "overlapped": sent[True] / link,
            "waited": sent[False] / link,
        }
    return StageEstimate(
        flops=flops_per_step(job, stage),
        hardware_flops=hardware_flops,
        memory_bytes=memory_bytes,
        collective_bytes=collectives.bytes_by_kind(transfers),
        seconds=seconds,
    )


def estimate_run(
    job: Job, chips: int, stage1_seconds: float | None, stage2_seconds: float | None
) -> RunEstimate:
    """What a run costs, of the seconds that a step of each stage takes.

    Args:
      job: What the run computes.
      chips: How many devices.
      stage1_seconds: A distilling step's; not used where the run has none.
      stage2_seconds: A plain step's.
    """
    plain_steps = job.steps - job.stage1_steps
    seconds = None
    if stage2_seconds is not None and (stage1_seconds is not None or job.stage1_steps == 0):
        seconds = plain_steps * stage2_seconds + job.stage1_steps * (stage1_seconds or 0.0)
    plain = flops_per_step(job, 2)
    return RunEstimate(
        flops=plain_steps * plain + job.stage1_steps * flops_per_step(job, 1),
        baseline_flops=job.steps * plain,
        seconds=seconds,
        baseline_seconds=None if stage2_seconds is None else job.steps * stage2_seconds,
        chips=chips,
    )


def _teacher_flops(job: Job, stage: int) -> float:
    if stage != 1 or job.teacher is None:
        return 0.0
    return flops.forward_flops_per_token(job.teacher, job.sequence_length)
