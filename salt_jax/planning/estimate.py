"""FLOPs and traffic of a compiled step, and estimates of its time and of the run's.

FLOPs are analytic (training/flops.py), of all devices together: for each token 3 forward passes of
the student and, in stage 1, one of the teacher. Hardware FLOPs add what rematerialisation repeats.

The time is a roofline's, of the makers' peaks times the share of them that programs of this kind
usually reach. Work that overlaps counts as the longest part of it, and what does not is added:

    step = max(compute, memory, overlapped transfers) + transfers that the program waits for

No program was run: take it for comparing settings and topologies, not for a promise.
"""

import dataclasses
from collections.abc import Mapping

from salt_jax.planning import collectives, hlo, traffic
from salt_jax.planning.compile import Job
from salt_jax.planning.topologies import Chip
from salt_jax.training import flops

COMPUTE_FRACTION = 0.6  # by matrix products and what lies between them
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.7


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step of a stage costs.

    Attributes:
      memory_bytes: Main memory read and written by a device.
      collective_bytes: Bytes that a device sends, by kind of transfer.
      seconds: Parts of the roofline: compute, memory, overlapped, waited; None where the peaks of
        the device are not known.
    """

    memory_bytes: float
    collective_bytes: Mapping[str, float]
    seconds: Mapping[str, float] | None

    @property
    def step_seconds(self) -> float | None:
        """The time of a step by the roofline."""
        if self.seconds is None:
            return None
        overlapping = (self.seconds[name] for name in ("compute", "memory", "overlapped"))
        return max(overlapping) + self.seconds["waited"]


@dataclasses.dataclass(frozen=True)
class RunEstimate:
    """What a run costs, beside the same run without a teacher; None where it is not known.

    Attributes:
      flops: Model FLOPs of all steps.
      baseline_flops: The same if all steps were plain.
      seconds: Of all steps, without compiling, evaluation and checkpoints.
      baseline_seconds: The same if all steps were plain.
    """

    flops: float
    baseline_flops: float
    seconds: float | None
    baseline_seconds: float | None

    @property
    def overhead(self) -> float | None:
        """The share of time that the teacher adds: 0.03 is 3%."""
        if self.seconds is None or self.baseline_seconds is None:
            return None
        return self.seconds / self.baseline_seconds - 1


def flops_per_step(job: Job, stage: int) -> float:
    """Model FLOPs of a step, all devices."""
    per_token = flops.train_flops_per_token(job.student, job.sequence_length)
    return (per_token + _teacher_flops(job, stage)) * job.tokens


def hardware_flops_per_step(job: Job, stage: int) -> float:
    """The same with what rematerialisation computes again."""
    per_token = flops.hardware_train_flops_per_token(job.student, job.sequence_length)
    return (per_token + _teacher_flops(job, stage)) * job.tokens


def estimate_cost(job: Job, stage: int, chip: Chip, chips: int, module: hlo.Module) -> Cost:
    """What a step of a stage costs on each of `chips` chips that run a compiled program.

    Raises:
      UnreadableError: The program has something that is not understood.
    """
    transfers = collectives.collectives(module)
    memory_bytes = traffic.memory_bytes(module)
    seconds = None
    if chip.peak_flops and chip.memory_bandwidth and chip.link_bandwidth:
        link = LINK_FRACTION * chip.link_bandwidth
        sent = {True: 0.0, False: 0.0}
        for transfer in transfers:
            sent[transfer.overlaps] += transfer.sent_bytes * transfer.times
        compute = hardware_flops_per_step(job, stage) / chips
        seconds = {
            "compute": compute / (COMPUTE_FRACTION * chip.peak_flops),
            "memory": memory_bytes / (MEMORY_FRACTION * chip.memory_bandwidth),
            "overlapped": sent[True] / link,
            "waited": sent[False] / link,
        }
    return Cost(memory_bytes, collectives.bytes_by_kind(transfers), seconds)


def estimate_run(job: Job, step_seconds: Mapping[int, float | None]) -> RunEstimate:
    """What a run costs, of the seconds that a step of each of its stages takes."""
    distilling = job.config.stage1_steps
    steps = {1: distilling, 2: job.config.steps - distilling}
    taken = [(steps[stage], step_seconds.get(stage)) for stage in steps if steps[stage]]
    plain_seconds, plain = step_seconds.get(2), flops_per_step(job, 2)
    return RunEstimate(
        flops=steps[1] * flops_per_step(job, 1) + steps[2] * plain,
        baseline_flops=job.config.steps * plain,
        seconds=None
        if any(seconds is None for _, seconds in taken)
        else sum(count * (seconds or 0.0) for count, seconds in taken),
        baseline_seconds=None if plain_seconds is None else job.config.steps * plain_seconds,
    )


def _teacher_flops(job: Job, stage: int) -> float:
    teacher = job.teacher_of(stage)
    return flops.forward_flops_per_token(teacher, job.sequence_length) if teacher else 0.0
