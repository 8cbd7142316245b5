"""Comparison of runs at equal steps, equal train FLOPs and equal time: numbers only."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from salt_jax.reporting.runs import EVALUATION, FLOPS_PARTS, SECONDS_PARTS, TRAINING, TrainRun


class Axis(NamedTuple):
    """A cost that runs are compared by: its name in files, its column in metrics, and a title."""

    name: str
    column: str
    title: str


STEPS = Axis("steps", "step", "steps")
FLOPS = Axis("train_flops", "train_flops", "train FLOPs")
SECONDS = Axis("seconds", "seconds", "training time")
AXES = (STEPS, FLOPS, SECONDS)


class Matched(NamedTuple):
    """Runs at the largest value of an axis that all of them reached.

    `read_at` of each run by label; a row of NaN for a run whose first evaluation comes later.
    """

    axis: Axis
    value: float
    readings: pd.DataFrame


def costs(points: pd.DataFrame, axis: Axis) -> npt.NDArray[np.float64]:
    """The axis' value at each point, made monotonic.

    Seconds may decrease a little where a resumed run repeats steps.
    """
    return np.maximum.accumulate(points[axis.column].to_numpy())


def read_at(evaluations: pd.DataFrame, axis: Axis, value: float) -> pd.Series | None:
    """A run at `value` of an axis, linearly interpolated between evaluations.

    Returns:
      The columns EVALUATION, and interpolated: 1 if `value` lies between two evaluations, else 0.
      None if it lies before the first evaluation or after the last.
    """
    values = costs(evaluations, axis)
    if not values.size or not values[0] <= value <= values[-1]:
        return None
    after = int(np.searchsorted(values, value))
    before = after if values[after] == value else after - 1
    part = 0.0 if before == after else (value - values[before]) / (values[after] - values[before])
    left, right = evaluations.iloc[before], evaluations.iloc[after]
    reading = left + part * (right - left)
    reading["interpolated"] = float(before < after)
    return reading


def charged_for_teacher(run: TrainRun) -> TrainRun:
    """The run with the cost of training its teacher added from its first step on.

    A run without a teacher, or with one of unknown cost, is unchanged.
    """
    if run.teacher is None or not run.teacher.cost_is_known:
        return run
    added = pd.Series(0.0, sorted({*EVALUATION, *TRAINING}))
    added[["train_flops", FLOPS_PARTS[-1]]] = run.teacher.costs["train_flops"]
    added[["seconds", SECONDS_PARTS[-1]]] = run.teacher.costs["seconds"]
    return dataclasses.replace(
        run,
        evaluations=run.evaluations + added[[*EVALUATION]],
        training=run.training + added[[*TRAINING]],
        final=None if run.final is None else run.final + added[[*EVALUATION]],
    )


def largest_common(runs: Sequence[TrainRun], axis: Axis) -> float | None:
    """The largest value of an axis at which every run has been evaluated, or None."""
    if not runs or any(run.evaluations.empty for run in runs):
        return None
    value = min(float(costs(run.evaluations, axis)[-1]) for run in runs)
    return value if math.isfinite(value) else None


def matched(runs: Sequence[TrainRun], axis: Axis) -> Matched | None:
    """All runs at the largest common value of an axis, or None if there is none."""
    value = largest_common(runs, axis)
    if value is None:
        return None
    readings = {run.label: read_at(run.evaluations, axis, value) for run in runs}
    columns = [*EVALUATION, "interpolated"]
    return Matched(axis, value, pd.DataFrame(readings, columns, dtype=float).T)


def cost_at_step(run: TrainRun, axis: Axis, step: int) -> float:
    """The cost of `step` steps of a run, linearly interpolated between measurements.

    At step 0 it may include scoring, and training the teacher if that is charged.
    """
    points = run.points
    parts = {FLOPS: FLOPS_PARTS, SECONDS: SECONDS_PARTS}.get(axis, ())
    spent = points.iloc[0][list(parts[2:])].sum(skipna=False)
    start = {"step": 0.0, axis.column: spent if math.isfinite(spent) else 0.0}
    points = pd.concat([pd.DataFrame([start]), points])
    return float(np.interp(step, points["step"], costs(points, axis)))


def comparable_groups(runs: Sequence[TrainRun]) -> tuple[tuple[TrainRun, ...], ...]:
    """Groups of comparable runs: of one model size and, where it is recorded, one cache.

    Arms of which every run taught others, of other sizes alone, are groups of their own, after the
    others. The group with the most runs comes first and, among equals, the smaller model; runs of
    unknown size (not finished yet) are a group.
    """
    taught: dict[pathlib.Path | None, set[int | None]] = {}
    for run in runs:
        if run.teacher is not None:
            taught.setdefault(run.teacher.path, set()).add(run.parameters)
    arms = {
        run.arm
        for run in runs
        if run.parameters in taught.get(run.origin.path.resolve(), {run.parameters})
    }
    groups: dict[tuple[bool, float, str | None], list[TrainRun]] = {}
    for run in runs:
        size, cache = run.parameters or math.inf, run.facts.get("cache_digest")
        groups.setdefault((run.arm not in arms, size, cache), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    return tuple(tuple(group) for _, group in ordered)
