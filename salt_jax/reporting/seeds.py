"""Arms over seeds: means, 95% intervals of Student's t, and paired differences to a reference.

    mean ± t(0.975, n - 1) · s / √n,    s² = Σ (x - mean)² / (n - 1)

over seeds, and for differences the same over x_arm - x_reference of equal seeds, in which the
effects of a seed's initialisation and order of rows on both arms cancel. One seed has no interval.
The teacher, the scores and the selection are the same for all seeds of a study, so the intervals
say nothing about other teachers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.special

from salt_jax.reporting.comparison import AXES, Axis, costs, largest_common, read_at
from salt_jax.reporting.runs import QUALITY, TrainRun
from salt_jax.reporting.tables import NOTHING, format_cost
from salt_jax.terminal import Table

REFERENCE = "baseline"
# mean (NaN without a finite value), half_width (of the 95% interval; NaN with fewer than two
# values), and count (of finite values).
Estimate = Mapping[str, float]

_NOTE = (
    "Means over seeds ± the half-width of a 95% interval (Student's t). Δ is the mean of the "
    "differences to {reference} seed by seed; * marks one whose interval excludes 0."
)


@dataclasses.dataclass(frozen=True)
class ArmOverSeeds:
    """An arm over its seeds, as in summary.json.

    `final` is at the end of each run, and `at_equal`, by axis name, at the largest steps, train
    FLOPs and time that every run reached. Both have, by metric of QUALITY, the level and the
    difference to the reference over common seeds (None for itself). `steps_to_reference` is the
    share of the reference's steps after which the arm has its final log-perplexity, over the seeds
    that reach it.
    """

    arm: str
    parameters: int | None
    seeds: tuple[int, ...]
    final: dict[str, Any]
    at_equal: dict[str, dict[str, Any]]
    steps_to_reference: Estimate
    seeds_that_got_there: int


def intervals(values: pd.DataFrame) -> pd.DataFrame:
    """The estimate of each row, over columns of seeds."""
    finite = values.where(np.isfinite(values))
    count = finite.count(axis=1)
    quantile = scipy.special.stdtrit(count - 1, 0.975)
    return pd.DataFrame(
        {
            "mean": finite.mean(axis=1),
            "half_width": quantile * finite.std(axis=1) / np.sqrt(count),
            "count": count,
        }
    )


def by_arm(runs: Sequence[TrainRun]) -> dict[str, dict[int, TrainRun]]:
    """Finished runs by arm, then by seed; of runs with equal seeds, the last one given."""
    found: dict[str, dict[int, TrainRun]] = {}
    for run in runs:
        if run.finished and run.seed is not None:
            found.setdefault(run.arm, {})[run.seed] = run
    return {arm: dict(sorted(group.items())) for arm, group in found.items()}


def arms_repeat(runs: Sequence[TrainRun]) -> bool:
    """Whether some arm has been run with several seeds."""
    return any(len(group) > 1 for group in by_arm(runs).values())


def common_values(runs: Sequence[TrainRun]) -> dict[Axis, float]:
    """The largest value of each axis that every finished run has reached."""
    finished = [run for group in by_arm(runs).values() for run in group.values()]
    found = {axis: largest_common(finished, axis) for axis in AXES}
    return {axis: value for axis, value in found.items() if value is not None}


def over_seeds(runs: Sequence[TrainRun], reference: str = REFERENCE) -> tuple[ArmOverSeeds, ...]:
    """Every arm of a group over its seeds, in the order given; unfinished runs are skipped, and
    without the reference there are no differences."""
    arms = by_arm(runs)
    ends = {arm: {seed: run.final for seed, run in own.items()} for arm, own in arms.items()}
    readings = {
        axis.name: {
            arm: {seed: read_at(run.evaluations, axis, value) for seed, run in own.items()}
            for arm, own in arms.items()
        }
        for axis, value in common_values(runs).items()
    }
    shares = {arm: _shares_of_steps(own, arms.get(reference, {})) for arm, own in arms.items()}
    return tuple(
        ArmOverSeeds(
            arm=arm,
            parameters=next(iter(own.values())).parameters,
            seeds=tuple(own),
            final=_compared(ends, arm, reference),
            at_equal={name: _compared(points, arm, reference) for name, points in readings.items()},
            steps_to_reference=intervals(pd.DataFrame([shares[arm]])).to_dict("index")[0],
            seeds_that_got_there=len(shares[arm]),
        )
        for arm, own in arms.items()
    )


def _compared(
    points: Mapping[str, Mapping[int, pd.Series | None]], arm: str, reference: str
) -> dict[str, Any]:
    """The level and the difference of each metric, from measurements by arm and seed."""
    by_seed = {
        one: pd.DataFrame(points[one], index=[*QUALITY], dtype=float)
        for one in {arm, reference} & points.keys()
    }
    levels, differences = intervals(by_seed[arm]).to_dict("index"), {}
    if arm != reference and reference in by_seed:
        differences = intervals(by_seed[arm] - by_seed[reference]).to_dict("index")
    return {
        metric: {"level": levels[metric], "difference": differences.get(metric)}
        for metric in QUALITY
    }


def _shares_of_steps(group: Mapping[int, TrainRun], base: Mapping[int, TrainRun]) -> list[float]:
    """The share of the reference's steps that each common seed takes to reach its result."""
    shares = []
    for seed in sorted(group.keys() & base.keys()):
        if not base[seed].evaluations.empty:
            end = base[seed].evaluations.iloc[-1]
            step = first_step_at(group[seed].evaluations, end["log_perplexity"])
            shares += [] if step is None else [step / end["step"]]
    return shares


def first_step_at(evaluations: pd.DataFrame, log_perplexity: float) -> float | None:
    """The first step with at most this log-perplexity, linearly interpolated, or None."""
    nats, steps = evaluations["log_perplexity"].to_numpy(), evaluations["step"].to_numpy()
    reached = np.flatnonzero(nats <= log_perplexity)
    if not reached.size:
        return None
    after = reached[0]
    before = after - 1 if after and math.isfinite(nats[after - 1]) else after
    return float(np.interp(log_perplexity, nats[[after, before]], steps[[after, before]]))


def band(runs: Sequence[TrainRun], axis: Axis, metric: str) -> pd.DataFrame:
    """The curve of one arm's runs at their common steps.

    Returns:
      A row for each step: the estimate of the metric, and `at`, the mean of the axis.
    """
    curves = [
        run.evaluations.assign(at=costs(run.evaluations, axis)).set_index("step", drop=False)
        for run in runs
    ]
    at, values = (
        pd.concat([curve[column] for curve in curves], axis=1, join="inner").sort_index()
        for column in ("at", metric)
    )
    return intervals(values).assign(at=at.mean(axis=1))


def final_seeds_table(arms: Sequence[ArmOverSeeds], reference: str, of_size: str = "") -> Table:
    """Every arm at the end of its runs; the title ends with `of_size`."""

    def reaching(one: ArmOverSeeds) -> str:
        count = f"{one.seeds_that_got_there} of {len(one.seeds)}"
        if one.arm == reference:
            return NOTHING
        share = _format(one.steps_to_reference, 100, 0)
        return f"{share} ({count})" if one.seeds_that_got_there else count

    return Table(
        title=f"Over seeds, at the end of each run{of_size}",
        columns=(*_columns(reference), f"reaches {reference}'s end after"),
        rows=tuple((*_row(one, one.final), reaching(one)) for one in arms),
        note=f"{_NOTE.format(reference=reference)} The last column: the share of {reference}'s "
        f"steps after which an arm reaches {reference}'s final log-perplexity, and how many seeds "
        "do; the arm's learning rate has not decayed by then.",
    )


def equal_cost_table(
    arms: Sequence[ArmOverSeeds], axis: Axis, value: float, reference: str, of_size: str = ""
) -> Table:
    """Every arm at one common value of an axis, a key of their `at_equal`."""
    return Table(
        title=f"Over seeds, at equal {axis.title}: {format_cost(axis, value)}{of_size}",
        columns=_columns(reference),
        rows=tuple(_row(one, one.at_equal[axis.name]) for one in arms),
        note=f"{_NOTE.format(reference=reference)} {NOTHING}: more than that was spent before the "
        "first evaluation.",
    )


def _columns(reference: str) -> tuple[str, ...]:
    delta = f"Δ to {reference}"
    return ("arm", "seeds", "log-perplexity", delta, "next-token accuracy", delta)


def _row(one: ArmOverSeeds, compared: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    seeds, count = str(len(one.seeds)), compared["log_perplexity"]["level"]["count"]
    cells = [one.arm, seeds if count == len(one.seeds) else f"{count} of {seeds}"]
    for metric, scale, digits in zip(QUALITY, (1, 100), (4, 2), strict=True):
        level, difference = compared[metric]["level"], compared[metric]["difference"]
        cells.append(_format(level, scale, digits))
        if difference is None:
            cells.append(NOTHING)
        else:
            is_clear = abs(difference["mean"]) > difference["half_width"]  # false for NaN
            cells.append(_format(difference, scale, digits, "+") + " *" * is_clear)
    return tuple(cells)


def _format(estimate: Estimate, scale: int, digits: int, sign: str = "") -> str:
    """An estimate as text: 3.594 ± 0.012, or at scale 100 32.14 ± 0.20%."""
    if not math.isfinite(estimate["mean"]):
        return NOTHING
    text = f"{estimate['mean'] * scale:{sign}.{digits}f}"
    if math.isfinite(estimate["half_width"]):
        text += f" ± {estimate['half_width'] * scale:.{digits}f}"
    return text + "%" * (scale == 100)
