"""Stability of runs: spikes of the training loss, and the switch from stage 1 to stage 2."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from salt_jax.reporting.runs import TrainRun
from salt_jax.reporting.tables import NOTHING, format_count, table
from salt_jax.terminal import Table

SWITCH_STEPS = 50  # either side
SPIKE_DEVIATIONS = 6.0
SPIKE_SHARE = 0.05  # of the median

_BEFORE, _LEAST_BEFORE = 50, 10  # lines of metrics that a line is compared with
_MOST_ROWS = 20
_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


def spikes(training: pd.DataFrame) -> pd.DataFrame:
    """Lines whose loss is far above those of the same stage before it.

    That is by more than SPIKE_DEVIATIONS standard deviations, estimated by the median absolute
    deviation of up to 50 lines, and by more than SPIKE_SHARE of their median. Lines of a spike are
    not compared with later lines.

    Returns:
      A row of TRAINING for each spike, where its loss is highest, with `usual`, the median loss of
      the lines before it in nats, and `lines`, the number of consecutive lines in the spike.
    """
    medians: list[float] = []
    before: list[float] = []
    stage = 0.0
    for line_stage, loss in zip(training["stage"], training["loss"], strict=True):
        if line_stage != stage:
            stage, before = line_stage, []
        median = least = math.nan
        if len(before) >= _LEAST_BEFORE:
            last = np.array(before[-_BEFORE:])
            median = float(np.median(last))
            deviation = _NORMAL * float(np.median(np.abs(last - median)))
            least = max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(median))
        is_high = loss - median > least
        medians.append(median if is_high else math.nan)
        if math.isfinite(loss) and not is_high:
            before.append(loss)
    is_high = ~np.isnan(np.array(medians))
    high = training[is_high].assign(usual=np.array(medians)[is_high])
    # Consecutive lines are one spike; a new stage starts with lines that can't be spikes.
    first = is_high & ~np.concatenate([[False], is_high[:-1]])
    grouped = high.groupby(np.cumsum(first)[is_high])
    highest = high.loc[grouped["loss"].idxmax()]
    usual, lines = grouped["usual"].first(), grouped.size()
    return highest.assign(usual=usual.to_numpy(), lines=lines.to_numpy())


def spikes_table(runs: Sequence[TrainRun]) -> Table | None:
    """The spikes of all runs, the highest first; None if there are none."""
    found = pd.concat([spikes(run.training).assign(label=run.label) for run in runs])
    if found.empty:
        return None
    found = found.iloc[(found["usual"] - found["loss"]).argsort(kind="stable")]
    left_out = len(found) - _MOST_ROWS
    more = f" {left_out:,} lower ones are not listed." if left_out > 0 else ""
    rows = [
        {
            "arm": spike["label"],
            "step": format_count(spike["step"]),
            "loss": f"{spike['loss']:.3f}",
            "usual loss": f"{spike['usual']:.3f}",
            "gradient norm": _norm(spike["grad_norm"]),
            "lines of metrics": format_count(spike["lines"]),
        }
        for spike in found.head(_MOST_ROWS).to_dict("records")
    ]
    note = (
        f"Loss more than {SPIKE_DEVIATIONS:g} deviations and {SPIKE_SHARE:.0%} above the median of "
        f"the {_BEFORE} lines of the same stage before it.{more}"
    )
    return table("Spikes of the training loss", rows, note)


def switch_table(runs: Sequence[TrainRun]) -> Table | None:
    """Means over SWITCH_STEPS steps on either side of the switch; None if no run has reached it."""
    rows = []
    for run in runs:
        lines, step = run.training, run.training["step"]
        switch = step[lines["stage"] == 1].max()
        is_before = step.between(switch - SWITCH_STEPS, switch, inclusive="right")
        is_after = step.between(switch, switch + SWITCH_STEPS, inclusive="right")
        is_after &= lines["stage"] == 2
        if is_after.any():
            before, after = (lines[side].mean(skipna=False) for side in (is_before, is_after))
            both = {c: f"{_norm(before[c])} → {_norm(after[c])}" for c in lines.columns}
            rows.append(
                {
                    "arm": run.label,
                    "last step with a teacher": format_count(switch),
                    "training loss": both["loss"],
                    "its log-perplexity": both["log_perplexity"],
                    "gradient norm": both["grad_norm"],
                    "norm of the update": both["update_norm"],
                }
            )
    title = f"Around the switch: means over {SWITCH_STEPS} steps before → after"
    note = (
        "The training loss jumps, since stage 1's includes the teacher's term; log-perplexity and "
        "the norms should not."
    )
    return table(title, rows, note) if rows else None


def _norm(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else NOTHING
