"""Runs set side by side at equal steps, equal train FLOPs and equal time.

In: training runs. Out: numbers only; how they are shown is the business of tables and plots.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from salt_jax.reporting.runs import Evaluation, TrainingPoint, TrainRun


@dataclasses.dataclass(frozen=True)
class Axis:
    """A cost that runs are compared by.

    Attributes:
      name: For files and summary.json.
      field: The attribute of Evaluation and TrainingPoint that holds it.
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
    """

    step: float
    log_perplexity: float
    next_token_accuracy: float
    interpolated: bool


@dataclasses.dataclass(frozen=True)
class Matched:
    """Runs at one common value of an axis; None for a run whose first evaluation comes later."""

    axis: Axis
    value: float
    readings: tuple[tuple[str, Reading | None], ...]


def costs(points: Sequence[Evaluation], axis: Axis) -> np.ndarray:
    """The axis' value at each evaluation, never falling.

    Steps that a resumed run repeats may leave seconds behind that fall by a little.
    """
    values = np.array([getattr(point, axis.field) for point in points], np.float64)
    return np.maximum.accumulate(values) if values.size else values


def read_at(evaluations: Sequence[Evaluation], axis: Axis, value: float) -> Reading | None:
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
        return Reading(right.step, right.log_perplexity, right.next_token_accuracy, False)
    left = evaluations[after - 1]
    part = float((value - values[after - 1]) / (values[after] - values[after - 1]))

    def between(start: float, end: float) -> float:
        return start + part * (end - start)

    return Reading(
        step=between(left.step, right.step),
        log_perplexity=between(left.log_perplexity, right.log_perplexity),
        next_token_accuracy=between(left.next_token_accuracy, right.next_token_accuracy),
        interpolated=True,
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
    points: list[TrainingPoint | Evaluation] = [*run.training, *run.evaluations]
    points.sort(key=lambda point: point.step)
    steps = [0.0, *(float(point.step) for point in points)]
    values = np.maximum.accumulate([0.0, *(getattr(point, axis.field) for point in points)])
    return float(np.interp(step, steps, values))


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
    return (
        "Some arms were run more than once: each run is shown by itself, and no mean or interval "
        "is computed."
    )
