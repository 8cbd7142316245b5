"""Runs set side by side at equal steps, equal train FLOPs and equal time.

In: training runs. Out: numbers only; how they are shown is the business of tables and plots.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from salt_jax.reporting.costs import Costs
from salt_jax.reporting.runs import EvaluationPoint, TrainingPoint, TrainRun


@dataclasses.dataclass(frozen=True)
class Axis:
    """A cost that runs are compared by.

    Attributes:
      name: For files and summary.json.
      field: The attribute of EvaluationPoint and TrainingPoint that holds it.
      title: For people.
    """

    name: str
    field: str
    title: str


STEPS = Axis("steps", "step", "steps")
FLOPS = Axis("train_flops", "train_flops", "train FLOPs")
SECONDS = Axis("seconds", "seconds", "training time")
AXES = (STEPS, FLOPS, SECONDS)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A run read off at one value of an axis.

    Attributes:
      step: Steps completed there; a fraction where it was interpolated.
      log_perplexity: Nats per token.
      next_token_accuracy: A fraction of 1.
      interpolated: Whether it lies between two evaluations.
      train_flops, seconds: What training had cost there.
      costs: What that consisted of.
    """

    step: float
    log_perplexity: float
    next_token_accuracy: float
    interpolated: bool
    train_flops: float = math.nan
    seconds: float = math.nan
    costs: Costs = Costs()  # noqa: RUF009 (frozen)


@dataclasses.dataclass(frozen=True)
class Matched:
    """Runs at one common value of an axis; None for a run whose first evaluation comes later."""

    axis: Axis
    value: float
    readings: tuple[tuple[str, Reading | None], ...]


def costs(points: Sequence[EvaluationPoint], axis: Axis) -> np.ndarray:
    """The axis' value at each evaluation, never falling.

    Steps that a resumed run repeats may leave seconds behind that fall by a little.
    """
    values = np.array([getattr(point, axis.field) for point in points], np.float64)
    return np.maximum.accumulate(values) if values.size else values


def read_at(evaluations: Sequence[EvaluationPoint], axis: Axis, value: float) -> Reading | None:
    """Reads a run at `value` of an axis, linearly between the two evaluations around it.

    Returns:
      None where `value` lies before the first evaluation or after the last one.
    """
    values = costs(evaluations, axis)
    if not values.size or not values[0] <= value <= values[-1]:
        return None
    after = int(np.searchsorted(values, value))
    right = evaluations[after]
    if values[after] == value:
        return _reading(right, right, 0.0)
    left = evaluations[after - 1]
    part = float((value - values[after - 1]) / (values[after] - values[after - 1]))
    return _reading(left, right, part)


def _reading(left: EvaluationPoint, right: EvaluationPoint, part: float) -> Reading:
    """`part` of the way from one evaluation to the next."""
    fields = ("step", "log_perplexity", "next_token_accuracy", "train_flops", "seconds")
    starts = {name: getattr(left, name) for name in fields}
    return Reading(
        **{name: start + part * (getattr(right, name) - start) for name, start in starts.items()},
        costs=left.costs.towards(right.costs, part),
        interpolated=left is not right,
    )


def charged_for_their_teachers(runs: Sequence[TrainRun]) -> tuple[TrainRun, ...]:
    """Runs whose costs include, from their first step on, what it took to train their teachers.

    A run whose teacher's cost is not known, or that has no teacher, stays as it is.
    """
    return tuple(_charged(run) for run in runs)


def _charged(run: TrainRun) -> TrainRun:
    made = run.teacher_training
    if made is None or not made.known:
        return run
    extra = {"train_flops": made.train_flops, "seconds": made.seconds}
    parts = {
        "teacher_training_flops": made.train_flops,
        "teacher_training_seconds": made.seconds,
    }

    def more(point: Any) -> Any:
        sums = {name: getattr(point, name) + value for name, value in extra.items()}
        return dataclasses.replace(point, **sums, costs=dataclasses.replace(point.costs, **parts))

    sums = {name: run.facts[name] + value for name, value in extra.items()}
    return dataclasses.replace(
        run,
        facts={**run.facts, **sums, **parts},
        evaluations=tuple(map(more, run.evaluations)),
        training=tuple(map(more, run.training)),
    )


def largest_common(runs: Sequence[TrainRun], axis: Axis) -> float | None:
    """The largest value of an axis at which every run has been evaluated; None if there is none."""
    if not runs or not all(run.evaluations for run in runs):
        return None
    value = min(float(costs(run.evaluations, axis)[-1]) for run in runs)
    return value if math.isfinite(value) else None


def matched(runs: Sequence[TrainRun], axis: Axis) -> Matched | None:
    """All runs at the largest common value of an axis; None without such a value."""
    value = largest_common(runs, axis)
    if value is None:
        return None
    readings = tuple((run.label, read_at(run.evaluations, axis, value)) for run in runs)
    return Matched(axis, value, readings)


def cost_at_step(run: TrainRun, axis: Axis, step: int) -> float:
    """What `step` steps of a run cost, linearly between the measurements around them."""
    points: list[TrainingPoint | EvaluationPoint] = [*run.training, *run.evaluations]
    points.sort(key=lambda point: point.step)
    steps = [0.0, *(float(point.step) for point in points)]
    before = _before_step_0(points[0].costs, axis) if points else 0.0
    values = np.maximum.accumulate([before, *(getattr(point, axis.field) for point in points)])
    return float(np.interp(step, steps, values))


def _before_step_0(costs: Costs, axis: Axis) -> float:
    """What was spent before a run began: scoring, and making its teacher if that is charged."""
    parts = {FLOPS: costs.flops_parts, SECONDS: costs.seconds_parts}.get(axis, ())
    spent = sum(parts[2:])
    return spent if math.isfinite(spent) else 0.0


def comparable_groups(runs: Sequence[TrainRun]) -> tuple[tuple[TrainRun, ...], ...]:
    """Runs that may be set side by side: of one model size, on one cache where that is recorded.

    Returns:
      The groups, the one with most runs first and, among equals, the larger model first; runs of
      unknown size (not finished yet) are a group of their own.
    """
    groups: dict[tuple[int | None, object], list[TrainRun]] = {}
    for run in runs:
        groups.setdefault((run.parameters, run.facts.get("cache_digest")), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), -(item[0][0] or 0)))
    return tuple(tuple(group) for _, group in ordered)


def seeds_sentence(runs: Sequence[TrainRun]) -> str:
    """What the number of seeds lets a reader conclude, in one or two sentences."""
    by_arm: dict[str, list[TrainRun]] = {}
    for run in runs:
        by_arm.setdefault(f"{run.arm} {run.parameters}", []).append(run)
    if not by_arm:
        return ""
    if all(len(group) == 1 for group in by_arm.values()):
        seeds = sorted({str(run.seed) for run in runs if run.seed is not None})
        named = f" (seed {', '.join(seeds)})" if seeds else ""
        return (
            f"This is one seed per arm{named}: differences between arms may be chance, and this "
            "page says nothing about which arm is better: that takes several seeds per arm."
        )
    least, most = min(map(len, by_arm.values())), max(map(len, by_arm.values()))
    count = str(most) if least == most else f"{least} to {most}"
    return (
        f"Each arm was run with {count} seeds, which vary the initialisation and the order of rows "
        "and not the teacher or the selection: arms are shown as means with 95% intervals."
    )
