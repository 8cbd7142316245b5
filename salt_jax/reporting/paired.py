"""The plot of a paired comparison, from a folder of `salt evaluate --compare`."""

import matplotlib
from matplotlib.figure import Figure

from salt_jax.evaluation.paired_comparison import KINDS
from salt_jax.reporting import plots
from salt_jax.reporting.plots import Plot
from salt_jax.reporting.runs import ComparisonFolder


@matplotlib.rc_context(plots.LOOK)
def comparison_plot(folder: ComparisonFolder) -> Plot:
    """The differences with their intervals, a panel for each kind of group."""
    (whole,) = folder.differences["all"].values()
    panels = {kind: found for kind, found in folder.differences.items() if kind != "all"}
    heights = [len(found) + 1.5 for found in panels.values()]
    figure = Figure(figsize=(6.0, 1.0 + 0.24 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    for panel, (kind, found) in zip(axes[:, 0], panels.items(), strict=True):
        places, colour = range(len(found)), plots.PALETTE[0]
        panel.axvspan(whole.low, whole.high, color=plots.PALE, alpha=0.6, lw=0)
        panel.axvline(0, color=plots.FAINT, linewidth=1)
        lows, highs = zip(*((each.low, each.high) for each in found.values()), strict=True)
        panel.hlines(places, lows, highs, color=colour, linewidth=1.6)
        panel.plot([each.mean for each in found.values()], places, "o", color=colour, markersize=4)
        panel.set_yticks(places, labels=[*found])
        panel.invert_yaxis()
        panel.set_title(KINDS[kind])
    axes[-1, 0].set_xlabel("difference (nats per token)")
    caption = (
        f"{folder.title}: differences of losses on the same tokens with 95% intervals; the band is "
        f"that of all tokens, {whole.mean:+.4f}. Below 0 the first model is better."
    )
    return plots.finished_plot("paired_comparison", caption, figure)
