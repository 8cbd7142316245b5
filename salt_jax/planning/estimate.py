"""FLOPs and traffic of a compiled step, and estimates of its time and of the run's.

FLOPs are analytic (training/flops.py), for all devices together: per token 3 forward passes of the
student and, in stage 1, one of the teacher. Hardware FLOPs add what rematerialisation recomputes.

The time is a roofline estimate, from published peaks times the fraction that such programs usually
reach. Of overlapping work the longest part counts, and other transfers are added:

    step = max(compute, memory, overlapped transfers) + transfers that the program waits for

No program is run: use it to compare settings and topologies, not as a promise.
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
class StageCost:
    """What a step of a stage costs.

    Attributes:
      memory_bytes: Bytes of main memory read and written by a device.
      collective_bytes: Bytes that a device sends, by kind of transfer.
      seconds: Parts of the roofline: compute, memory, overlapped, waited; None if the device's
        peaks are unknown.
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


def flops_per_step(job: Job, stage: int) -> float:
    """Model FLOPs of a step on all devices."""
    per_token = flops.train_flops_per_token(job.student, job.sequence_length)
    return (per_token + _teacher_flops(job, stage)) * job.tokens


def hardware_flops_per_step(job: Job, stage: int) -> float:
    """FLOPs of a step on all devices, with rematerialisation."""
    per_token = flops.hardware_train_flops_per_token(job.student, job.sequence_length)
    return (per_token + _teacher_flops(job, stage)) * job.tokens


def estimate_cost(job: Job, stage: int, chip: Chip, chips: int, module: hlo.Module) -> StageCost:
    """What a step of a stage costs on each of `chips` chips that run a compiled program.

    Raises:
      UnreadableError: The program can't be parsed.
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
    return StageCost(memory_bytes, collectives.bytes_by_kind(transfers), seconds)


def estimate_run(
    job: Job, chips: int, step_seconds: Mapping[int, float | None]
) -> dict[str, float | None]:
    """The cost of a run and of the same run without a teacher, for summary.json.

    Args:
      job: The run.
      chips: The number of devices.
      step_seconds: Seconds of a step of each stage; None or missing if unknown.

    Returns:
      Steps, model FLOPs, days, chip-hours and, with a price, their cost, without compiling,
      evaluation and checkpoints; the same if all steps were plain ("baseline_"), and the share of
      time that the teacher adds.
    """
    steps, distilling = job.config.steps, job.config.stage1_steps
    first, second = step_seconds.get(1) if distilling else 0.0, step_seconds.get(2)
    baseline = None if second is None else steps * second
    total = None
    if first is not None and (second is not None or steps == distilling):
        total = distilling * first + (steps - distilling) * (second or 0.0)
    plain = flops_per_step(job, 2)
    run: dict[str, float | None] = {
        "steps": steps,
        "stage1_steps": distilling,
        "flops": distilling * flops_per_step(job, 1) + (steps - distilling) * plain,
        "baseline_flops": steps * plain,
        "teacher_overhead": total / baseline - 1 if total and baseline else None,
    }
    for name, seconds in (("", total), ("baseline_", baseline)):
        run[f"{name}days"] = None if seconds is None else seconds / 86_400
        hours = None if seconds is None else seconds * chips / 3600
        run[f"{name}chip_hours"] = hours
        price = job.config.monitoring.price
        run[f"{name}cost"] = None if hours is None or price is None else hours * price
    return run


def _teacher_flops(job: Job, stage: int) -> float:
    teacher = job.teacher_of(stage)
    return flops.forward_flops_per_token(teacher, job.sequence_length) if teacher else 0.0
