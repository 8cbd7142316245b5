"""The plots of a report, all with one look.

In: training runs, scores and selections. Out: PNG images with a text that says what is to be seen.
matplotlib is used without its global state, so nothing outside is touched.
"""

import dataclasses
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from salt_jax.reporting.comparison import FLOPS, SECONDS, STEPS, Axis, cost_at_step, costs
from salt_jax.reporting.runs import ScoreFolder, SelectionFolder, TrainRun
from salt_jax.reporting.seeds import band
from salt_jax.reporting.tables import SUPERSCRIPTS, time_unit

INK, FAINT, PALE = "#222222", "#8a8a8a", "#c9ced6"
# Okabe and Ito's colours, told apart with any common colour blindness; their yellow is too pale.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
# As matplotlib has them: an offset, then ink and gap in turn; no gaps is a solid line.
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


@dataclasses.dataclass(frozen=True)
class Metric:
    """What an evaluation plot shows: an attribute of EvaluationPoint, and its title."""

    name: str
    field: str
    title: str


LOG_PERPLEXITY = Metric("log_perplexity", "log_perplexity", "log-perplexity (nats per token)")
ACCURACY = Metric("accuracy", "next_token_accuracy", "next-token accuracy (%)")


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure: its file name without ending, what it shows in words, and its PNG bytes."""

    name: str
    caption: str
    figure: Figure
    png: bytes


@dataclasses.dataclass(frozen=True)
class Style:
    """How one run is drawn, in every plot and beside its name in the tables."""

    colour: str
    dash: Dash
    marker: str


# Runs that are shown for orientation only.
IN_THE_BACKGROUND = Style(FAINT, (0, (2, 2)), "")


def styles(arms: Mapping[str, str]) -> dict[str, Style]:
    """A style for each label; the usual arms have the same colour in every report.

    Args:
      arms: The arm of each label. Where several labels are of one usual arm, the one that is
        called like the arm, or else the first, has the arm's colour.
    """
    colours: dict[str, str] = {}
    for label, arm in sorted(arms.items(), key=lambda item: item[0] != item[1]):
        usual = USUAL_COLOURS.get(arm)
        if usual and usual not in colours.values():
            colours[label] = usual
    free = [colour for colour in PALETTE if colour not in colours.values()] or list(PALETTE)
    chosen = {}
    rest = 0
    for index, label in enumerate(arms):
        dash = DASHES[0]
        if label not in colours:
            colours[label] = free[rest % len(free)]
            dash = DASHES[rest // len(free) % len(DASHES)]
            rest += 1
        chosen[label] = Style(colours[label], dash, MARKERS[index % len(MARKERS)])
    return chosen


def evaluation_plot(
    runs: Sequence[TrainRun],
    others: Sequence[TrainRun],
    looks: Mapping[str, Style],
    axis: Axis,
    metric: Metric,
) -> Plot:
    """Held-out results against a cost: the whole run above, its second half enlarged below.

    Args:
      runs: The arms that are compared; they set the limits of the enlarged half.
      others: Runs that are not compared (another size), drawn faintly in the upper half only.
      looks: A style for each label.
      axis: What to draw them against.
      metric: What to draw.
    """
    percent = 100.0 if metric is ACCURACY else 1.0
    curves = {
        run.label: (
            costs(run.evaluations, axis),
            percent * np.array([getattr(point, metric.field) for point in run.evaluations]),
        )
        for run in [*runs, *others]
    }
    with matplotlib.rc_context(LOOK):
        figure, (whole, half) = _two_panels()
        for run in others:
            look = IN_THE_BACKGROUND
            whole.plot(*curves[run.label], color=look.colour, linestyle=look.dash, linewidth=1.2)
        for panel in (whole, half):
            for run in runs:
                _draw_curve(panel, run, curves[run.label], looks[run.label], axis)
        _enlarge_second_half(half, [curves[run.label] for run in runs])
        whole.set_title(f"{metric.title}, held-out text")
        half.set_title("the second half, enlarged")
        end = max((float(x[-1]) for x, _ in curves.values() if x.size), default=1.0)
        for panel in (whole, half):
            _scale_cost_axis(panel, axis, end)
        shown, switches = _looks_of(runs, looks)
        _legend(figure, shown, others, switches)
        caption = (
            f"Held-out {metric.title} against {axis.title}, the whole run and its second half. "
            f"Arms: {', '.join(run.label for run in runs)}.{_switch_sentence(runs)}"
        )
        return Plot(f"{metric.name}_by_{axis.name}", caption, figure, to_png(figure))


def band_plot(
    arms: Mapping[str, Sequence[TrainRun]],
    looks: Mapping[str, Style],
    axis: Axis,
    metric: Metric,
) -> Plot:
    """Means over seeds with their 95% intervals: the whole run above, its second half below.

    Args:
      arms: Each arm's runs, one a seed.
      looks: A style for each arm.
      axis: What to draw them against.
      metric: What to draw.
    """
    percent = 100.0 if metric is ACCURACY else 1.0
    bands = {arm: band(runs, axis, metric.field) for arm, runs in arms.items()}
    with matplotlib.rc_context(LOOK):
        figure, (whole, half) = _two_panels()
        for panel in (whole, half):
            for arm, curve in bands.items():
                look = looks[arm]
                low, high = (
                    percent * (curve.mean + sign * curve.half_width) for sign in (-1.0, 1.0)
                )
                panel.fill_between(curve.values, low, high, color=look.colour, alpha=0.15, lw=0)
                panel.plot(
                    curve.values,
                    percent * curve.mean,
                    color=look.colour,
                    linestyle=look.dash,
                    linewidth=1.6,
                    marker=look.marker if curve.values.size <= MOST_MARKERS else None,
                    markersize=3.5,
                )
        curves = [(curve.values, percent * curve.mean) for curve in bands.values()]
        _enlarge_second_half(half, curves)
        whole.set_title(f"{metric.title}, held-out text")
        half.set_title("the second half, enlarged")
        end = max((float(x[-1]) for x, _ in curves if x.size), default=1.0)
        for panel in (whole, half):
            _scale_cost_axis(panel, axis, end)
        _legend(figure, {arm: looks[arm] for arm in arms}, [], switches=False)
        seeds = ", ".join(f"{arm} ({len(runs)})" for arm, runs in arms.items())
        caption = (
            f"Held-out {metric.title} against {axis.title}: means over seeds with 95% intervals, "
            f"the whole run and its second half. Arms (seeds): {seeds}."
        )
        return Plot(f"{metric.name}_by_{axis.name}", caption, figure, to_png(figure))


def training_plot(runs: Sequence[TrainRun], looks: Mapping[str, Style]) -> Plot:
    """Training loss against steps: the objective above, next-token loss alone below, enlarged."""
    window = max((1, *(len(run.training) // 20 for run in runs)))
    hard_curves = []
    with matplotlib.rc_context(LOOK):
        figure, (objective, hard) = _two_panels()
        for run in runs:
            steps = np.array([point.step for point in run.training], np.float64)
            stages = np.array([point.stage for point in run.training])
            losses = np.array([point.loss for point in run.training], np.float64)
            hard_losses = np.array([point.log_perplexity for point in run.training], np.float64)
            smooth = np.full(losses.shape, np.nan)
            for stage in set(stages):
                smooth[stages == stage] = smoothed(losses[stages == stage], window)
            hard_curves.append((steps, smoothed(hard_losses, window)))
            look = looks[run.label]
            line: Any = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.6}
            objective.plot(steps, losses, color=look.colour, linewidth=0.6, alpha=0.35)
            objective.plot(steps, smooth, **line)
            hard.plot(*hard_curves[-1], **line)
            for panel in (objective, hard):
                _mark_switch(panel, run, STEPS)
        _enlarge_second_half(hard, hard_curves)
        objective.set_title("training loss: the objective, blended in stage 1")
        hard.set_title("training log-perplexity, second half enlarged")
        for panel in (objective, hard):
            _scale_cost_axis(panel, STEPS, 1.0)
        shown, switches = _looks_of(runs, looks)
        _legend(figure, shown, [], switches)
        lines = "1 line of metrics" if window == 1 else f"{window} lines of metrics"
        caption = (
            f"Training loss against steps, averaged over {lines}. In stage 1 the objective blends "
            "next-token loss with the teacher's soft labels, so it jumps at the switch; the "
            "log-perplexity below is the next-token loss alone, in both stages."
            f"{_switch_sentence(runs)}"
        )
        return Plot("training_loss", caption, figure, to_png(figure))


def score_plot(scored: ScoreFolder, selections: Sequence[SelectionFolder]) -> Plot:
    """How scores are distributed, with what each selection took of them and its cut."""
    finite = scored.scores[np.isfinite(scored.scores)]
    edges = np.histogram_bin_edges(finite, SCORE_BINS) if finite.size else np.linspace(0, 1, 2)
    left_out = scored.scores.size - finite.size
    aside = f"; {left_out:,} more have none (−∞)" if left_out else ""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(6.0, 4.2), layout="constrained")
        panel = figure.add_subplot()
        counts = np.histogram(finite, edges)[0]
        panel.stairs(counts, edges, fill=True, color=PALE)
        handles = [Line2D([], [], color=PALE, linewidth=8)]
        names = [f"all {finite.size:,} rows with a score{aside}"]
        for index, selected in enumerate(selections):
            colour = PALETTE[index % len(PALETTE)]
            taken = scored.scores[selected.row_ids]
            panel.stairs(
                np.histogram(taken[np.isfinite(taken)], edges)[0],
                edges,
                color=colour,
                linewidth=1.6,
            )
            handles.append(Line2D([], [], color=colour, linewidth=1.6))
            cut = ""
            if selected.cut is not None:
                each = "cut in each subset, the lowest" if selected.stratified else "cut"
                cut = f", {each} at {selected.cut:.3f}"
            names.append(f"{selected.name}: {taken.size:,} rows{cut}")
            if selected.cut is not None and not selected.stratified:
                panel.axvline(selected.cut, color=colour, linestyle="--", linewidth=1.4)
        panel.set_yscale("symlog", linthresh=1)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        panel.set_ylim(0, max(2.0, 2.0 * float(counts.max(initial=1))))
        panel.set_xlabel("score (nats per token)")
        panel.set_ylabel("rows, logarithmic")
        figure.legend(handles, names, loc="outside upper left", fontsize=9.5)
        cuts = "; ".join(names[1:]) or "no selection was given"
        caption = f"Scores ({scored.column}) in {scored.origin.path.name}: {names[0]}; {cuts}."
        return Plot("scores", caption, figure, to_png(figure))


def smoothed(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """The mean over `window` neighbours on both sides together, of what is finite among them.

    Near an end the neighbourhood is cut short, so that the ends are not pulled anywhere.

        [0, 3, 6, 9], window 3 → [1.5, 3, 6, 7.5]
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(values.size)
    first = np.maximum(places - window // 2, 0)
    last = np.minimum(places + (window - 1) // 2 + 1, values.size)
    number = counts[last] - counts[first]
    mean = (sums[last] - sums[first]) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)


def _two_panels() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(6.0, 6.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[2, 3])
    return figure, (upper, lower)


def _draw_curve(
    panel: Axes,
    run: TrainRun,
    curve: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    look: Style,
    axis: Axis,
) -> None:
    marker = look.marker if len(run.evaluations) <= MOST_MARKERS else None
    panel.plot(
        *curve,
        color=look.colour,
        linestyle=look.dash,
        linewidth=1.6,
        marker=marker,
        markersize=3.5,
    )
    switch = _mark_switch(panel, run, axis)
    if switch is None or not curve[0].size or not curve[0][0] <= switch <= curve[0][-1]:
        return
    height = float(np.interp(switch, *curve))
    panel.plot([switch], [height], "D", color="white", markeredgecolor=look.colour, markersize=7)


def _mark_switch(panel: Axes, run: TrainRun, axis: Axis) -> float | None:
    """A dotted line where the run went over to stage 2; gives its place on the axis."""
    if run.switch_step is None:
        return None
    switch = cost_at_step(run, axis, run.switch_step)
    panel.axvline(switch, color=FAINT, linestyle=":", linewidth=1.1, zorder=0.5)
    return switch


def _switch_sentence(runs: Sequence[TrainRun]) -> str:
    switches = [
        f"{run.label} after step {run.switch_step:,}" for run in runs if run.switch_step is not None
    ]
    return f" Switch to stage 2: {', '.join(switches)}." if switches else ""


def _enlarge_second_half(
    panel: Axes, curves: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
) -> None:
    """Limits that show the curves' second half, and only it."""
    end = max((float(x[-1]) for x, _ in curves if x.size), default=0.0)
    seen = [y[(x >= end / 2) & np.isfinite(y)] for x, y in curves]
    heights = np.concatenate(seen) if seen else np.zeros(0)
    if end <= 0 or not heights.size:
        return
    low, high = float(heights.min()), float(heights.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    panel.set_ylim(low - margin, high + margin)
    panel.set_xlim(end / 2, end * 1.01)


def _scale_cost_axis(panel: Axes, axis: Axis, end: float) -> None:
    """A label with a unit, and ticks in it."""
    if axis == FLOPS and end > 0:
        exponent = 3 * math.floor(math.log10(end) / 3)
        unit, label = 10.0**exponent, f"train FLOPs (10{str(exponent).translate(SUPERSCRIPTS)})"
    elif axis == SECONDS:
        name, unit = time_unit(end)
        label = f"training time ({name})"
    else:
        unit, label = 1.0, axis.title
    panel.xaxis.set_major_locator(_ScaledLocator(unit))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,.10g}"))
    panel.set_xlabel(label)


class _ScaledLocator(MaxNLocator):
    """Ticks that are round in `unit`."""

    def __init__(self, unit: float) -> None:
        super().__init__(nbins=7, steps=[1, 2, 2.5, 5, 10])
        self._unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Any:
        return self._unit * np.asarray(super().tick_values(vmin / self._unit, vmax / self._unit))


def _legend(
    figure: Figure, shown: Mapping[str, Style], others: Sequence[TrainRun], switches: bool
) -> None:
    handles = []
    for look in shown.values():
        line = Line2D([], [], color=look.colour, linestyle=look.dash, marker=look.marker)
        line.set_markersize(4)
        handles.append(line)
    names = list(shown)
    if others:
        look = IN_THE_BACKGROUND
        handles.append(Line2D([], [], color=look.colour, linestyle=look.dash, linewidth=1.2))
        names.append("not compared: " + ", ".join(run.label for run in others))
    if switches:
        marker = Line2D([], [], color=FAINT, linestyle=":", marker="D", markerfacecolor="white")
        handles.append(marker)
        names.append("switch to stage 2")
    columns = 3 if max(map(len, names), default=0) < 18 else 2
    figure.legend(handles, names, loc="outside upper left", ncols=columns)


def _looks_of(
    runs: Sequence[TrainRun], looks: Mapping[str, Style]
) -> tuple[dict[str, Style], bool]:
    """Each run's look for the legend, and whether any of them has a switch."""
    switches = any(run.switch_step is not None for run in runs)
    return {run.label: looks[run.label] for run in runs}, switches


def to_png(figure: Figure) -> bytes:
    """The figure's bytes, the same whenever it is drawn anew."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # the letters of a name that are not in the font, raw
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(
            buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()
