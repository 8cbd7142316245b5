"""Arms over seeds: means, intervals and paired differences.

In: runs of one group (`comparison.comparable_groups`) in which arms repeat, each with its seed.
Out: numbers with 95% intervals of Student's t over seeds,

    mean ± t(0.975, n - 1) · s / √n,    s² = Σ (x - mean)² / (n - 1),

and for differences the same over x_arm - x_reference of equal seeds: what varies with the seed in
both arms alike, the initialisation and the order of rows, cancels. With one seed there is no
interval. The teacher, the scores and the selection are the same for all seeds of a study, so the
intervals say nothing about other teachers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special

from salt_jax.reporting.comparison import (
    AXES,
    STEPS,
    Axis,
    Reading,
    costs,
    largest_common,
    read_at,
)
from salt_jax.reporting.runs import EvaluationPoint, TrainRun

REFERENCE = "baseline"
METRICS = ("log_perplexity", "next_token_accuracy")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      mean: Of the values that are finite; NaN where there are none.
      half_width: Of the 95% interval; NaN with fewer than two values.
      count: Values.
    """

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The estimate from one value a seed."""
        finite = np.array([value for value in values if math.isfinite(value)], np.float64)
        count = finite.size
        if count < 2:
            return cls(float(finite[0]) if count else math.nan, math.nan, count)
        quantile = float(scipy.special.stdtrit(count - 1, 0.975))
        return cls(
            float(finite.mean()), quantile * float(finite.std(ddof=1)) / math.sqrt(count), count
        )


@dataclasses.dataclass(frozen=True)
class Compared:
    """One metric of one arm: its level, and its difference to the reference, by seed.

    Attributes:
      level: Over the arm's seeds.
      difference: Over the seeds that arm and reference share; None for the reference itself.
    """

    level: Estimate
    difference: Estimate | None


@dataclasses.dataclass(frozen=True)
class ArmOverSeeds:
    """An arm of a study.

    Attributes:
      arm: Its name.
      seeds: Of its runs, ascending.
      final: At the end of each run, by metric.
      at_equal: At the largest steps, train FLOPs and time that every run of the group reached, by
        axis name and metric; without the axes that have no such value.
      steps_to_reference: Steps at which it is as good as the reference at its end by
        log-perplexity, over the reference's steps, by seed; of the seeds that get there.
      seeds_that_got_there: How many do.
    """

    arm: str
    seeds: tuple[int, ...]
    final: dict[str, Compared]
    at_equal: dict[str, dict[str, Compared]]
    steps_to_reference: Estimate
    seeds_that_got_there: int


def arms_repeat(runs: Sequence[TrainRun]) -> bool:
    """Whether some arm has been run with several seeds."""
    return any(len(group) > 1 for group in by_arm(runs).values())


def by_arm(runs: Sequence[TrainRun]) -> dict[str, dict[int, TrainRun]]:
    """Finished runs by arm, then by seed; of two with one seed, the later one given."""
    found: dict[str, dict[int, TrainRun]] = {}
    for run in runs:
        if run.finished and run.seed is not None:
            found.setdefault(run.arm, {})[run.seed] = run
    return {arm: dict(sorted(group.items())) for arm, group in found.items()}


def common_values(runs: Sequence[TrainRun]) -> dict[Axis, float]:
    """The largest value of each axis that every finished run has reached."""
    finished = [run for group in by_arm(runs).values() for run in group.values()]
    found = {axis: largest_common(finished, axis) for axis in AXES}
    return {axis: value for axis, value in found.items() if value is not None}


def over_seeds(runs: Sequence[TrainRun], reference: str = REFERENCE) -> tuple[ArmOverSeeds, ...]:
    """Every arm of a group over its seeds, in the order in which they were given.

    Args:
      runs: Of one group; unfinished ones are left out.
      reference: The arm to compare with; without it there are no differences.
    """
    arms = by_arm(runs)
    common = common_values(runs)
    base = arms.get(reference, {})
    results = []
    for arm, group in arms.items():
        others = {} if arm == reference else base

        def compared(
            read: Callable[[TrainRun], EvaluationPoint | Reading | None],
            group: dict[int, TrainRun] = group,
            others: dict[int, TrainRun] = others,
        ) -> dict[str, Compared]:
            return {name: _compared(group, others, read, name) for name in METRICS}

        reached = _steps_to_reference(group, base)
        results.append(
            ArmOverSeeds(
                arm=arm,
                seeds=tuple(group),
                final=compared(lambda run: run.final),
                at_equal={
                    axis.name: compared(_reader(axis, value)) for axis, value in common.items()
                },
                steps_to_reference=Estimate.of(reached),
                seeds_that_got_there=len(reached),
            )
        )
    return tuple(results)


def _reader(axis: Axis, value: float) -> Callable[[TrainRun], Reading | None]:
    return lambda run: read_at(run.evaluations, axis, value)


def _compared(
    group: dict[int, TrainRun],
    others: dict[int, TrainRun],
    read: Callable[[TrainRun], EvaluationPoint | Reading | None],
    metric: str,
) -> Compared:
    def value(run: TrainRun) -> float:
        found = read(run)
        return math.nan if found is None else float(getattr(found, metric))

    shared = group.keys() & others.keys()
    pairs = [value(group[seed]) - value(others[seed]) for seed in sorted(shared)]
    level = Estimate.of([value(run) for run in group.values()])
    return Compared(level, Estimate.of(pairs) if others else None)


def _steps_to_reference(group: dict[int, TrainRun], base: dict[int, TrainRun]) -> list[float]:
    """For each shared seed that gets there, the share of the reference's steps that it takes."""
    shares = []
    for seed in sorted(group.keys() & base.keys()):
        end = base[seed].evaluations[-1] if base[seed].evaluations else None
        step = None if end is None else first_step_at(group[seed].evaluations, end.log_perplexity)
        if end is not None and step is not None:
            shares.append(step / end.step)
    return shares


def first_step_at(evaluations: Sequence[EvaluationPoint], log_perplexity: float) -> float | None:
    """The first step with at most this log-perplexity, linearly between evaluations, or None."""
    for left, right in zip([None, *evaluations], evaluations, strict=False):
        if right.log_perplexity > log_perplexity:
            continue
        if left is None or not math.isfinite(left.log_perplexity):
            return float(right.step)
        fall = left.log_perplexity - right.log_perplexity
        part = (left.log_perplexity - log_perplexity) / fall
        return left.step + part * (right.step - left.step)
    return None


@dataclasses.dataclass(frozen=True)
class Band:
    """An arm's curve over seeds.

    Attributes:
      values: The axis at each step that all its seeds were evaluated at, a mean over seeds, [P].
      mean: Of the metric there, [P].
      half_width: Of its 95% interval; NaN with one seed, [P].
    """

    values: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray


def band(runs: Sequence[TrainRun], axis: Axis, metric: str) -> Band:
    """The curve of one arm's runs against an axis, at the steps that all of them have."""
    tables = [
        {
            point.step: (float(value), float(getattr(point, metric)))
            for value, point in zip(costs(run.evaluations, axis), run.evaluations, strict=True)
        }
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    estimates = [Estimate.of([table[step][1] for table in tables]) for step in steps]
    at = steps if axis == STEPS else [np.mean([t[step][0] for t in tables]) for step in steps]
    return Band(
        np.array(at, np.float64),
        np.array([one.mean for one in estimates]),
        np.array([one.half_width for one in estimates]),
    )
