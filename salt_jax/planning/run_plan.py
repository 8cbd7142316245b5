"""The plan of a run on one topology, for summary.json."""

from collections.abc import Mapping
from typing import Any

from salt_jax.planning import changes, estimate
from salt_jax.planning.compile import Job
from salt_jax.planning.stage_plan import StagePlan, plan_stage
from salt_jax.planning.stored_labels import labels_in_place_of_teacher, labels_that_are_read
from salt_jax.planning.topologies import Topology
from salt_jax.terminal import say


def plan_run(job: Job, topology: Topology, *, try_changes: bool, stored_ids: int) -> dict[str, Any]:
    """Compiles the stages of a run for a topology.

    Args:
      job: The run.
      topology: The devices.
      try_changes: Whether to search for settings that make a stage fit, or that use idle memory.
      stored_ids: Ids per token of the soft labels that would replace the teacher.
    """
    stages: dict[int, StagePlan] = {}
    for stage in job.stages:
        say(f"compiling stage {stage} for {topology.name} …")
        stages[stage] = plan_stage(job, topology, stage)
    summaries = [_stage(plan) for plan in stages.values()]
    faster = None
    if try_changes and any(plan.fits is False for plan in stages.values()):
        stages = _add_change(stages, summaries)
    elif try_changes and all(plan.fits for plan in stages.values()):
        faster = _faster(stages)
    seconds = {stage: plan.step_seconds for stage, plan in stages.items()}
    chips = len(topology.devices)
    return {
        "topology": topology.name,
        "chips": chips,
        "device_kind": topology.chip.kind,
        "hbm_gib": topology.chip.hbm_gib,
        "mesh": dict(job.mesh(topology).shape),
        "stages": summaries,
        "faster": faster,
        "run": _run(stages),
        "stored_labels": labels_in_place_of_teacher(
            job, stored_ids, chips, seconds.get(1), seconds[2]
        ),
        "read_labels": labels_that_are_read(job, seconds.get(1)),
    }


def _stage(plan: StagePlan) -> dict[str, Any]:
    """A stage with the settings as they were given."""
    return {
        "stage": plan.stage,
        "microbatches": plan.job.microbatches_of(plan.stage),
        "fits": plan.fits,
        "flops_per_step": estimate.flops_per_step(plan.job, plan.stage),
        "change": None,
        "tried": [],
        **plan.measures(),
    }


def _run(stages: Mapping[int, StagePlan]) -> dict[str, Any]:
    seconds = {stage: plan.step_seconds for stage, plan in stages.items()}
    return estimate.estimate_run(stages[2].job, len(stages[2].topology.devices), seconds)


def _add_change(
    stages: dict[int, StagePlan], summaries: list[dict[str, Any]]
) -> dict[int, StagePlan]:
    """Searches for settings with which all stages fit, adds them, and returns those stages."""
    for plan in stages.values():
        if not plan.fits:
            say(f"  stage {plan.stage} does not fit: {_size(plan)}")

    def tried(change: changes.Change, outcome: StagePlan) -> None:
        summary = next(s for s in summaries if s["stage"] == outcome.stage)
        summary["tried"].append({"settings": change.settings, **outcome.sizes()})
        say(f"  stage {outcome.stage} with {change.flags}: {_size(outcome)}")

    fit = changes.find_fit(stages, plan_stage, tried)
    if fit is None:
        return stages
    for summary in summaries:
        summary["change"] = {
            "settings": fit.change.settings,
            "flags": fit.change.flags,
            **fit.stages[summary["stage"]].measures(),
        }
    return dict(fit.stages)


def _faster(stages: Mapping[int, StagePlan]) -> dict[str, Any] | None:
    """Settings that use idle memory to make the run faster, or None."""
    attempts: list[dict[str, Any]] = []

    def tried(change: changes.Change, outcome: StagePlan) -> None:
        seconds = outcome.step_seconds
        attempts.append(
            {
                "stage": outcome.stage,
                "settings": change.settings,
                **outcome.sizes(),
                "step_seconds_estimate": seconds,
            }
        )
        time = "" if seconds is None else f", {seconds:.3g} s"
        say(f"  stage {outcome.stage} with {change.flags}: {_size(outcome)}{time}")

    found = changes.find_faster(stages, plan_stage, tried)
    if found is None:
        return {"settings": {}, "tried": attempts} if attempts else None
    return {
        "settings": found.change.settings,
        "flags": found.change.flags,
        "stages": [{"stage": n, **plan.measures()} for n, plan in sorted(found.stages.items())],
        "run": _run(found.stages),
        "tried": attempts,
    }


def _size(plan: StagePlan) -> str:
    gib = plan.compiled.needed_gib
    return "too large" if gib is None else f"{gib:.2f} GiB"
