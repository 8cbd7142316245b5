"""The plan of one stage on one topology: its compiled program, measured."""

import dataclasses
from typing import Any

from salt_jax.planning import buffers, estimate, hlo
from salt_jax.planning.compile import CompiledStage, Job, compile_stage
from salt_jax.planning.topologies import GIB, Topology

_BUFFERS = 8  # of the largest temporaries


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of a stage.

    Attributes:
      job: The run.
      topology: The devices.
      stage: 1, with the teacher, or 2.
      compiled: Its program and memory.
      cost: The cost of a step; None if the program was refused or can't be parsed.
      temporaries: The program's largest arrays.
      unread: A sentence that says why the program can't be parsed; None if it can.
    """

    job: Job
    topology: Topology
    stage: int
    compiled: CompiledStage
    cost: estimate.StageCost | None = None
    temporaries: tuple[buffers.Buffer, ...] = ()
    unread: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether it compiled and its peak is within the device's memory; None if unknown."""
        limit = self.topology.chip.hbm_gib
        if self.compiled.memory is None:
            return False
        return None if limit is None else self.compiled.memory.peak <= limit * GIB

    @property
    def step_seconds(self) -> float | None:
        """The estimated time of a step; None if unknown."""
        return self.cost.step_seconds if self.cost else None

    def sizes(self) -> dict[str, Any]:
        """Its memory, for summary.json."""
        memory, needed = self.compiled.memory, self.compiled.needed_gib
        if memory is None:
            return {"peak_hbm_gib": None, "needed_gib": needed}
        names = ("arguments", "temporaries", "outputs", "aliased", "bound")
        analysis = {name: getattr(memory, name) / GIB for name in names}
        return {"peak_hbm_gib": needed, "needed_gib": needed, "memory_analysis_gib": analysis}

    def measures(self) -> dict[str, Any]:
        """Its measurements, for summary.json; null if unknown."""
        found = {**self.sizes(), "compile_seconds": self.compiled.seconds}
        if self.compiled.memory is None:
            return found
        cost, seconds, peak = self.cost, self.step_seconds, self.topology.chip.peak_flops
        flops = estimate.flops_per_step(self.job, self.stage)
        mfu = None
        if seconds and peak:
            mfu = flops / (seconds * len(self.topology.devices) * peak)
        return {
            **found,
            "breakdown_gib": {name: size / GIB for name, size in self.compiled.parts.items()},
            "hardware_flops_per_step": estimate.hardware_flops_per_step(self.job, self.stage),
            "memory_bytes_per_step": cost and cost.memory_bytes,
            "collective_bytes_per_step": cost and dict(cost.collective_bytes),
            "network_bytes_per_step": cost and cost.network_bytes,
            "step_seconds_estimate": seconds,
            "roofline_seconds": dict(cost.seconds) if cost and cost.seconds else None,
            "tokens_per_second_estimate": self.job.tokens / seconds if seconds else None,
            "mfu_estimate": mfu,
            "largest_temporaries": [buffer._asdict() for buffer in self.temporaries],
            "unread": self.unread,
        }


def plan_stage(job: Job, topology: Topology, stage: int) -> StagePlan:
    """Compiles a stage for a topology and measures its program.

    Raises:
      InputError: The mesh or the batch does not fit the devices.
    """
    compiled = compile_stage(job, topology, stage)
    plan = StagePlan(job, topology, stage, compiled)
    if compiled.memory is None:
        return plan
    try:
        module = hlo.parse(compiled.hlo)
        cost = estimate.estimate_cost(job, stage, topology, module)
        temporaries = tuple(buffers.largest(module, _BUFFERS))
    except hlo.UnreadableError as error:
        return dataclasses.replace(plan, unread=str(error))
    return dataclasses.replace(plan, cost=cost, temporaries=temporaries)
