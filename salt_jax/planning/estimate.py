"""FLOPs and traffic of a compiled step, and estimates of its time and of the run's.

FLOPs are analytic (training/flops.py), for all devices together: per token 3 forward passes of the
student and, in stage 1, one of the teacher. Hardware FLOPs add what rematerialisation recomputes.

The time is a roofline estimate, from published peaks times the fraction that such programs usually
reach. Of overlapping work the longest part counts, and other transfers are added:

    step = max(compute, memory, overlapped transfers) + transfers that the program waits for

What goes to another slice or node takes the time that the network needs for it.

No program is run: use it to compare settings and topologies, not as a promise.
"""

import dataclasses
from collections.abc import Mapping

from salt_jax.planning import collectives, hlo, traffic
from salt_jax.planning.compile import Job
from salt_jax.planning.topologies import Topology
from salt_jax.training import flops
from salt_jax.training.teacher import teaching_flops_per_token

COMPUTE_FRACTION = 0.6  # by matrix products and what lies between them
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.7


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What a step of a stage costs.

    Attributes:
      memory_bytes: Bytes of main memory read and written by a device.
      collective_bytes: Bytes that a device sends, by kind of transfer.
      network_bytes: Of these, the bytes that go to other slices or nodes.
      seconds: Parts of the roofline: compute, memory, overlapped, waited; None if the device's
        peaks are unknown.
    """

    memory_bytes: float
    collective_bytes: Mapping[str, float]
    network_bytes: float
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


def estimate_cost(job: Job, stage: int, topology: Topology, module: hlo.Module) -> StageCost:
    """What a step of a stage costs on each device of a topology that runs a compiled program.

    Raises:
      UnreadableError: The program can't be parsed.
    """
    chip, chips = topology.chip, len(topology.devices)
    transfers = collectives.collectives(module, topology.slices, chips)
    memory_bytes = traffic.memory_bytes(module)
    network_bytes = sum(transfer.network_bytes * transfer.times for transfer in transfers)
    seconds = None
    if chip.peak_flops and chip.memory_bandwidth and chip.link_bandwidth:
        link, sending = LINK_FRACTION * chip.link_bandwidth, {True: 0.0, False: 0.0}
        network = LINK_FRACTION * (chip.network_bandwidth or chip.link_bandwidth)
        for transfer in transfers:
            within = (transfer.sent_bytes - transfer.network_bytes) / link
            beyond = transfer.network_bytes / network
            sending[transfer.overlaps] += transfer.times * (within + beyond)
        compute = hardware_flops_per_step(job, stage) / chips
        seconds = {
            "compute": compute / (COMPUTE_FRACTION * chip.peak_flops),
            "memory": memory_bytes / (MEMORY_FRACTION * chip.memory_bandwidth),
            "overlapped": sending[True],
            "waited": sending[False],
        }
    sent = collectives.bytes_by_kind(transfers)
    return StageCost(memory_bytes, sent, network_bytes, seconds)


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
    if teacher is None:
        return 0.0
    return teaching_flops_per_token(job.config, job.student, teacher, job.sequence_length)
