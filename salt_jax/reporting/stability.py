"""How steady runs were: the switch from stage 1 to stage 2, and jumps of the loss.

In: runs with their lines of training metrics. Out: Table.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from salt_jax.reporting.runs import TrainingPoint, TrainRun
from salt_jax.reporting.tables import NOTHING, format_count
from salt_jax.terminal import Table

SWITCH_STEPS = 50  # either side
SPIKE_DEVIATIONS = 6.0
SPIKE_SHARE = 0.05  # of the median

_BEFORE, _LEAST_BEFORE = 50, 10  # lines of metrics that a spike is compared with
_MOST_ROWS = 20
_NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


@dataclasses.dataclass(frozen=True)
class Spike:
    """A jump of the training loss.

    Attributes:
      point: The line of metrics where it is highest.
      usual: The median loss of the lines before, in nats.
      lines: How many in a row are so high.
    """

    point: TrainingPoint
    usual: float
    lines: int


def spikes(points: Sequence[TrainingPoint]) -> list[Spike]:
    """Where the loss is far above the lines of the same stage before it.

    Far is by more than SPIKE_DEVIATIONS standard deviations, which are estimated by the median
    absolute deviation of up to 50 lines, and by more than SPIKE_SHARE of their median. Lines of a
    spike are not among those that the next ones are compared with.
    """
    found: list[Spike] = []
    usual: list[float] = []
    stage, in_spike = 0, False
    for point in points:
        if point.stage != stage:
            stage, usual, in_spike = point.stage, [], False
        before = np.array(usual[-_BEFORE:])
        median = float(np.median(before)) if len(before) else math.nan
        deviation = _NORMAL * float(np.median(np.abs(before - median))) if len(before) else 0.0
        above = point.loss - median
        if len(before) >= _LEAST_BEFORE and (
            above > max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(median))
        ):
            if in_spike:
                last = found.pop()
                highest = max(last.point, point, key=lambda one: one.loss)
                found.append(Spike(highest, last.usual, last.lines + 1))
            else:
                found.append(Spike(point, median, 1))
            in_spike = True
        else:
            in_spike = False
            if math.isfinite(point.loss):
                usual.append(point.loss)
    return found


def spikes_table(runs: Sequence[TrainRun]) -> Table | None:
    """The spikes of all runs, the highest first; None without any."""
    found = [(run.label, spike) for run in runs for spike in spikes(run.training)]
    if not found:
        return None
    found.sort(key=lambda pair: pair[1].usual - pair[1].point.loss)
    left_out = len(found) - _MOST_ROWS
    more = f" {left_out:,} lower ones are left out." if left_out > 0 else ""
    return Table(
        title="Spikes of the training loss",
        columns=("arm", "step", "loss", "usual loss", "gradient norm", "lines of metrics"),
        rows=tuple(
            (
                label,
                format_count(spike.point.step),
                f"{spike.point.loss:.3f}",
                f"{spike.usual:.3f}",
                _norm(spike.point.grad_norm),
                format_count(spike.lines),
            )
            for label, spike in found[:_MOST_ROWS]
        ),
        note=(
            f"Loss more than {SPIKE_DEVIATIONS:g} deviations and {SPIKE_SHARE:.0%} above the "
            f"median of the {_BEFORE} lines of the same stage before it.{more}"
        ),
    )


def switch_table(runs: Sequence[TrainRun]) -> Table | None:
    """Means over SWITCH_STEPS steps either side of the switch; None where no run has come to it."""
    rows = []
    for run in runs:
        switch = next((p.step for p in reversed(run.training) if p.stage == 1), None)
        after = [p for p in run.training if switch is not None and p.stage == 2 and p.step > switch]
        if switch is None or not after:
            continue
        before = [p for p in run.training if switch - SWITCH_STEPS < p.step <= switch]
        after = [p for p in after if p.step <= switch + SWITCH_STEPS]
        if not after:
            continue
        sides = before, after
        rows.append(
            (
                run.label,
                format_count(switch),
                _both(sides, lambda point: point.loss),
                _both(sides, lambda point: point.log_perplexity),
                _both(sides, lambda point: point.grad_norm),
                _both(sides, lambda point: point.update_norm),
            )
        )
    if not rows:
        return None
    return Table(
        title=f"Around the switch: means over {SWITCH_STEPS} steps before → after",
        columns=(
            *("arm", "last step with a teacher", "training loss", "its log-perplexity"),
            *("gradient norm", "norm of the update"),
        ),
        rows=tuple(rows),
        note=(
            "The training loss jumps, since stage 1's holds the teacher's part; log-perplexity "
            "and the norms should not."
        ),
    )


def _both(
    sides: tuple[Sequence[TrainingPoint], Sequence[TrainingPoint]],
    value: Callable[[TrainingPoint], float],
) -> str:
    return " → ".join(_norm(float(np.mean([value(point) for point in side]))) for side in sides)


def _norm(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else NOTHING
