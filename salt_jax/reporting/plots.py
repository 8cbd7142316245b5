"""The plots of a report in one style: PNG images with captions.

They don't use matplotlib's global state, so that a caller's own figures are not affected.
"""

import dataclasses
import io
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from salt_jax.reporting.comparison import FLOPS, SECONDS, STEPS, Axis, cost_at_step
from salt_jax.reporting.ladder import Ladder
from salt_jax.reporting.runs import ScoreFolder, SelectionFolder, TrainRun
from salt_jax.reporting.seeds import band
from salt_jax.reporting.tables import SUPERSCRIPTS, time_unit

INK, FAINT, PALE = "#222222", "#8a8a8a", "#c9ced6"
# Okabe and Ito's colours, safe for any common colour blindness, without their pale yellow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
# matplotlib's dash patterns: an offset, then dashes and gaps in turn; empty for a solid line.
Dash = tuple[float, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ((0, ()), (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "v", "P", "X", "D")
USUAL_COLOURS = {"baseline": INK, "rkd": "#E69F00", "salt": "#0072B2", "salt_ds": "#009E73"}
MOST_MARKERS = 40
SCORE_BINS = 80

LOOK: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a name with $ in it is a name
}


class Metric(NamedTuple):
    """The metric of an evaluation plot: a name for files, the column, a title, and a scale."""

    name: str
    column: str
    title: str
    scale: float


LOG_PERPLEXITY = Metric("log_perplexity", "log_perplexity", "log-perplexity (nats per token)", 1.0)
ACCURACY = Metric("accuracy", "next_token_accuracy", "next-token accuracy (%)", 100.0)
METRICS = (LOG_PERPLEXITY, ACCURACY)


class Plot(NamedTuple):
    """A figure: its file name without suffix, its caption, and its PNG bytes."""

    name: str
    caption: str
    figure: Figure
    png: bytes


@dataclasses.dataclass(frozen=True)
class Style:
    """The style of a run in every plot, and beside its name in the tables."""

    colour: str
    dash: Dash
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """matplotlib's settings for the line."""
        width = 1.6 if self.marker else 1.2
        return {"color": self.colour, "linestyle": self.dash, "linewidth": width}


# The style of runs that are not compared.
IN_THE_BACKGROUND = Style(FAINT, (0, (2, 2)), "")


def styles(arms: Mapping[str, str]) -> dict[str, Style]:
    """A style for each label, given the arm of each; known arms have fixed colours.

    If several labels belong to one known arm, the label equal to the arm, or else the first, gets
    its colour.
    """
    colours: dict[str, str] = {}
    for label, arm in sorted(arms.items(), key=lambda item: item[0] != item[1]):
        usual = USUAL_COLOURS.get(arm)
        if usual and usual not in colours.values():
            colours[label] = usual
    free = [colour for colour in PALETTE if colour not in colours.values()] or list(PALETTE)
    others = itertools.cycle((colour, dash) for dash in DASHES for colour in free)
    chosen = {}
    for label, marker in zip(arms, itertools.cycle(MARKERS)):
        usual_look = (colours[label], DASHES[0]) if label in colours else None
        chosen[label] = Style(*(usual_look or next(others)), marker)
    return chosen


@matplotlib.rc_context(LOOK)
def evaluation_plot(
    arms: Mapping[str, Sequence[TrainRun]],
    others: Sequence[TrainRun],
    looks: Mapping[str, Style],
    axis: Axis,
    metric: Metric,
) -> Plot:
    """Held-out results against a cost: the whole run above, its second half enlarged below.

    Args:
      arms: The runs of each arm, one per seed; several are drawn as a mean with a 95% interval.
        They set the limits of the enlarged half.
      others: Runs that are not compared (of another size), drawn faintly in the upper half only.
      looks: A style for each arm.
      axis, metric: The horizontal and the vertical axis.
    """
    curves = [_curve(runs, axis, metric) for runs in arms.values()]
    faint = [_curve([run], axis, metric) for run in others]
    unit, label = _unit(axis, pd.concat([*curves, *faint])["at"].max())
    figure, (whole, half) = _two_panels(label)
    for curve in faint:
        whole.plot(curve["at"] / unit, curve["mean"], **IN_THE_BACKGROUND.line)
    several_seeds = any(len(runs) > 1 for runs in arms.values())
    for (arm, runs), curve in zip(arms.items(), curves, strict=True):
        look, low = looks[arm], curve["mean"] - curve["half_width"]
        marker = look.marker if len(curve) <= MOST_MARKERS else None
        curve["at"] /= unit
        for panel in (whole, half):
            high = curve["mean"] + curve["half_width"]
            panel.fill_between(curve["at"], low, high, color=look.colour, alpha=0.15, lw=0)
            panel.plot(curve["at"], curve["mean"], **look.line, marker=marker, markersize=3.5)
            for run in () if several_seeds else runs:
                _mark_switch(panel, run, axis, unit, curve, look)
    _enlarge_second_half(half, curves)
    whole.set_title(f"{metric.title}, held-out text")
    half.set_title("the second half, enlarged")
    alone = [] if several_seeds else [run for runs in arms.values() for run in runs]
    _legend(figure, {arm: looks[arm] for arm in arms}, alone, others)
    caption = f"Held-out {metric.title} against {axis.title}"
    if several_seeds:
        named = ", ".join(f"{arm} ({len(runs)})" for arm, runs in arms.items())
        caption += (
            ": means over seeds with 95% intervals, the whole run and its second half. "
            f"Arms (seeds): {named}."
        )
    else:
        caption += f", the whole run and its second half. Arms: {', '.join(arms)}."
    return finished_plot(f"{metric.name}_by_{axis.name}", caption + _switch_sentence(alone), figure)


@matplotlib.rc_context(LOOK)
def ladder_plot(ladder: Ladder, looks: Mapping[str, Style]) -> Plot:
    """Final losses against train FLOPs with each arm's law, and below what it saves."""
    figure, (losses, savings) = _two_panels("train FLOPs, logarithmic")
    for arm, name in enumerate(ladder.arms):
        look, logs = looks[name], ladder.logs[arm]
        grid = np.linspace(np.nanmin(logs), np.nanmax(logs), 100)
        drawn = [(losses, ladder.loss(arm, grid), 1)]
        if arm:
            drawn.append((savings, ladder.saving(arm, grid), 100))
        for panel, bands, scale in drawn:
            at, (middle, low, high) = ladder.centre * np.exp(grid), (scale * x for x in bands)
            panel.fill_between(at, low, high, color=look.colour, alpha=0.15, lw=0)
            panel.plot(at, middle, **look.line)
        flops_SxN = np.broadcast_to(np.exp(logs)[:, None], ladder.nats[arm].shape)
        at, nats = ladder.centre * flops_SxN.ravel(), ladder.nats[arm].ravel()
        losses.plot(at, nats, color=look.colour, marker=look.marker, linestyle="", markersize=4)
    for panel in (losses, savings):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(_power_of_ten)
    savings.axhline(0, color=FAINT, linewidth=1)
    losses.set_title("final log-perplexity (nats per token), held-out text")
    savings.set_title(f"FLOPs saved to reach {ladder.arms[0]}'s loss (%)")
    _legend(figure, {name: looks[name] for name in ladder.arms}, [])
    caption = (
        "Final log-perplexity of each run against its train FLOPs with the law of each arm, and "
        f"the share of {ladder.arms[0]}'s FLOPs that an arm saves by these laws, with 95% bands."
    )
    return finished_plot("ladder", caption, figure)


@matplotlib.rc_context(LOOK)
def training_plot(runs: Sequence[TrainRun], looks: Mapping[str, Style]) -> Plot:
    """Training loss against steps: the objective above, the next-token loss below, enlarged."""
    window = max((1, *(len(run.training) // 20 for run in runs)))
    figure, (objective, hard) = _two_panels(STEPS.title)
    curves = []
    for run in runs:
        lines, look = run.training, looks[run.label]
        smooth = lines.groupby("stage")["loss"].transform(smoothed, window)
        curves.append(
            pd.DataFrame({"at": lines["step"], "mean": smoothed(lines["log_perplexity"], window)})
        )
        objective.plot(lines["step"], lines["loss"], color=look.colour, linewidth=0.6, alpha=0.35)
        objective.plot(lines["step"], smooth, **look.line)
        hard.plot(curves[-1]["at"], curves[-1]["mean"], **look.line)
        for panel in (objective, hard):
            _mark_switch(panel, run, STEPS)
    _enlarge_second_half(hard, curves)
    objective.set_title("training loss: the objective, blended in stage 1")
    hard.set_title("training log-perplexity, second half enlarged")
    _legend(figure, {run.label: looks[run.label] for run in runs}, runs)
    averaged = "1 line of metrics" if window == 1 else f"{window} lines of metrics"
    caption = (
        f"Training loss against steps, averaged over {averaged}. In stage 1 the objective blends "
        "next-token loss with the teacher's soft labels, so it jumps at the switch; the "
        "log-perplexity below is the next-token loss alone, in both stages."
        f"{_switch_sentence(runs)}"
    )
    return finished_plot("training_loss", caption, figure)


@matplotlib.rc_context(LOOK)
def score_plot(scored: ScoreFolder, selections: Sequence[SelectionFolder]) -> Plot:
    """The distribution of scores, with each selection's rows and cut."""
    finite = scored.scores[np.isfinite(scored.scores)]
    edges = np.histogram_bin_edges(finite, SCORE_BINS) if finite.size else np.linspace(0, 1, 2)
    counts = np.histogram(finite, edges)[0]
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    panel = figure.add_subplot()
    panel.stairs(counts, edges, fill=True, color=PALE)
    left_out = scored.scores.size - finite.size
    aside = f"; {left_out:,} more have none (−∞)" if left_out else ""
    names = [f"all {finite.size:,} rows with a score{aside}"]
    handles = [Line2D([], [], color=PALE, linewidth=8)]
    for index, selected in enumerate(selections):
        colour = PALETTE[index % len(PALETTE)]
        taken = scored.scores[selected.selection.row_ids]
        own_counts = np.histogram(taken[np.isfinite(taken)], edges)[0]
        panel.stairs(own_counts, edges, color=colour, linewidth=1.6)
        handles.append(Line2D([], [], color=colour, linewidth=1.6))
        cut = ""
        if selected.cut is not None:
            each = "cut in each subset, the lowest" if selected.stratified else "cut"
            cut = f", {each} at {selected.cut:.3f}"
            if not selected.stratified:
                panel.axvline(selected.cut, color=colour, linestyle="--", linewidth=1.4)
        names.append(f"{selected.name}: {taken.size:,} rows{cut}")
    scale_counts(panel, float(np.max(counts, initial=1)))
    panel.set_xlabel("score (nats per token)")
    panel.set_ylabel("rows, logarithmic")
    figure.legend(handles, names, loc="outside upper left", fontsize=9.5)
    cuts = "; ".join(names[1:]) or "no selection was given"
    caption = f"Scores ({scored.score.column}) in {scored.name}: {names[0]}; {cuts}."
    return finished_plot("scores", caption, figure)


def smoothed(values: pd.Series, window: int) -> pd.Series:
    """The centred moving average over `window` values, ignoring those that are not finite.

    At the ends the window is truncated:

        [0, 3, 6, 9], window 3 → [1.5, 3, 6, 7.5]
    """
    return values.rolling(window, center=True, min_periods=1).mean()


def scale_counts(panel: Axes, highest: float) -> None:
    """Sets a logarithmic vertical axis for counts, from 0 to above the highest."""
    panel.set_yscale("symlog", linthresh=1)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set_ylim(0, max(2.0, 2.0 * highest))


def _curve(runs: Sequence[TrainRun], axis: Axis, metric: Metric) -> pd.DataFrame:
    curve = band(runs, axis, metric.column)
    curve[["mean", "half_width"]] *= metric.scale
    return curve


def _unit(axis: Axis, end: float) -> tuple[float, str]:
    """The unit of an axis up to `end`, and the axis' label."""
    if axis == FLOPS and end > 0:
        exponent = 3 * math.floor(math.log10(end) / 3)
        return 10.0**exponent, f"train FLOPs (10{str(exponent).translate(SUPERSCRIPTS)})"
    if axis == SECONDS:
        name, unit = time_unit(end)
        return unit, f"training time ({name})"
    return 1.0, axis.title


def _power_of_ten(value: float, place: float) -> str:
    del place
    return f"10{str(round(math.log10(value))).translate(SUPERSCRIPTS)}"


def _two_panels(label: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(6.0, 6.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[2, 3])
    for panel in (upper, lower):
        panel.set_xlabel(label)
        panel.xaxis.set_major_formatter("{x:,.10g}")
    return figure, (upper, lower)


def _mark_switch(
    panel: Axes,
    run: TrainRun,
    axis: Axis,
    unit: float = 1.0,
    curve: pd.DataFrame | None = None,
    look: Style = IN_THE_BACKGROUND,
) -> None:
    """Marks the switch to stage 2 with a dotted line and a diamond on the run's curve."""
    if run.switch_step is None:
        return
    switch = cost_at_step(run, axis, run.switch_step) / unit
    panel.axvline(switch, color=FAINT, linestyle=":", linewidth=1.1, zorder=0.5)
    if curve is not None and curve["at"].min() <= switch <= curve["at"].max():
        height = np.interp(switch, curve["at"], curve["mean"])
        edge = look.colour
        panel.plot([switch], [height], "D", color="white", markeredgecolor=edge, markersize=7)


def _switch_sentence(runs: Sequence[TrainRun]) -> str:
    switches = []
    for run in runs:
        if run.switch_step is not None:
            watched = run.facts.get("watched", {"n_kd": None})
            decided = f" (at a running mean of {watched['mean']:.3g})" if watched["n_kd"] else ""
            switches.append(f"{run.label} after step {run.switch_step:,}{decided}")
    return f" Switch to stage 2: {', '.join(switches)}." if switches else ""


def _enlarge_second_half(panel: Axes, curves: Sequence[pd.DataFrame]) -> None:
    """Sets limits that show only the second half of the curves (at, mean)."""
    both = pd.concat(curves)
    end = both["at"].max()
    heights = both["mean"][(both["at"] >= end / 2) & np.isfinite(both["mean"])]
    if not end > 0 or heights.empty:
        return
    low, high = heights.min(), heights.max()
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    panel.set_ylim(low - margin, high + margin)
    panel.set_xlim(end / 2, end * 1.01)


def _legend(
    figure: Figure,
    looks: Mapping[str, Style],
    runs: Sequence[TrainRun],
    others: Sequence[TrainRun] = (),
) -> None:
    """A legend of everything in `looks`, the other runs, and the switch if a run has one."""
    lines: dict[str, dict[str, Any]] = {
        name: {"color": look.colour, "linestyle": look.dash, "marker": look.marker, "markersize": 4}
        for name, look in looks.items()
    }
    if others:
        name = "not compared: " + ", ".join(run.label for run in others)
        lines[name] = IN_THE_BACKGROUND.line
    if any(run.switch_step is not None for run in runs):
        diamond = {"color": FAINT, "linestyle": ":", "marker": "D", "markerfacecolor": "white"}
        lines["switch to stage 2"] = diamond
    handles = [Line2D([], [], **line) for line in lines.values()]
    columns = 3 if max(map(len, lines)) < 18 else 2
    figure.legend(handles, [*lines], loc="outside upper left", ncols=columns)


def finished_plot(name: str, caption: str, figure: Figure) -> Plot:
    """The plot with its image, whose bytes are reproducible."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # names may have letters that the font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(
            buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None}
        )
    return Plot(name, caption, figure, buffer.getvalue())
