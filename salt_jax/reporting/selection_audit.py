"""Tables, plots and excerpts of a selection's audit.json, for `salt select` and `salt report`."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from salt_jax.reporting import plots
from salt_jax.reporting.plots import INK, PALE, PALETTE, Plot, finished_plot, scale_counts
from salt_jax.reporting.tables import NOTHING, format_count, format_nats, format_share, table
from salt_jax.terminal import Table, shortened

_GROUPS = {
    "highest": "The highest scores selected",
    "cut_kept": "At the cut: the lowest scores selected",
    "cut_left_out": "At the cut: the highest scores left out",
    "lowest_kept": "The lowest scores selected",
    "lowest": "The lowest scores of all rows",
    "sample": "Some of the rows selected",
}
_COLUMNS = 3  # of the histograms by subset
_LONGEST_NAME = 30  # characters, beside bars


def audit_tables(name: str, audit: Mapping[str, Any]) -> list[Table]:
    """Selected rows by subset, and overlaps with other selections."""
    tables = [_subset_table(name, audit)]
    if audit["overlaps"]:
        tables.append(_overlap_table(name, audit["overlaps"]))
    return tables


def audit_plots(name: str, audit: Mapping[str, Any]) -> list[Plot]:
    """Selected share and score histogram of each subset; none without scores."""
    if "score_edges" not in audit:
        return []
    return [_share_plot(name, audit), _histogram_plot(name, audit)]


def audit_excerpts(audit: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The audit's example rows by kind, each as a heading and its text."""
    groups = {title: audit["examples"].get(group) for group, title in _GROUPS.items()}
    return {title: [_excerpt(row) for row in rows] for title, rows in groups.items() if rows}


def _excerpt(row: Mapping[str, Any]) -> tuple[str, str]:
    head = f"row {row['row_id']:,}, {row['subset']}"
    if row["score"] is not None:
        head += f", score {row['score']:.3f}, {row['learnable']:.1%} learnable"
    return head, row["text"]


def _subset_table(name: str, audit: Mapping[str, Any]) -> Table:
    rows = []
    for subset, part in [*audit["by_subset"].items(), ("all rows", audit["whole"])]:
        row = {
            "subset": subset,
            "rows": format_count(part["rows"]),
            "selected": format_count(part["kept"]),
            "share of its rows": format_share(part["kept_share"]),
            "share of selection": format_share(part["share_of_kept"]),
        }
        if audit.get("stratified"):
            row["cut"] = format_nats(_cut(audit, part))
        if "score_edges" in audit:
            row |= {
                "mean loss": format_nats(part["log_perplexity"]),
                "of selected": format_nats(part["log_perplexity_kept"]),
                "learnable": format_share(part["learnable"]),
                "of those selected": format_share(part["learnable_kept"]),
            }
        rows.append(row)
    return table(f"Selected rows by subset: {name}", rows, _note(audit))


def _note(audit: Mapping[str, Any]) -> str:
    copies, sentences = audit["duplicates"], []
    if "score_edges" in audit:
        sentences.append(
            "Mean loss: of the rows' tokens under the scorer, in nats. Learnable: the share of "
            "tokens among the scorer's k most likely ones."
        )
    if audit.get("stratified"):
        sentences.append("Cut: the lowest score selected of the subset, in nats.")
    ties = audit.get("ties", {"rows": 0, "kept": 0})
    if left_out := ties["rows"] - ties["kept"]:
        sentences.append(
            f"{left_out:,} rows that were left out have exactly the score of the cut, as have "
            f"{ties['kept']:,} of those selected: the scores don't tell them apart."
        )
    if not audit["by_subset"]:
        sentences.append("Figures by subset are unknown: give the selection scores (--scores).")
    if "kept" in copies:
        sentence = f"{copies['kept']:,} of the selected rows are exact copies of an earlier one"
        if "all" in copies:
            sentence += f", and {copies['all']:,} of all rows"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _overlap_table(name: str, overlaps: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    names = [pathlib.PurePath(other["selection"]).name for other in overlaps]
    for other, short in zip(overlaps, names, strict=True):
        score, scorer = other["score"] or {}, other["scorer"] or {}
        what = [f"{key} {value}" for key, value in score.items() if value]
        what += [f"scorer's step {scorer['step']}"] if "step" in scorer else []
        rows.append(
            {
                "selection": short if names.count(short) == 1 else str(other["selection"]),
                "by": ", ".join(what) or str(other["how"].get("rule", NOTHING)),
                "rows": format_count(other["rows"]),
                "shared": format_count(other["shared"]),
                "Jaccard": format_share(other["jaccard"]),
                f"share of {name}": format_share(other["share_of_this"]),
                "by chance": format_share(other["share_by_chance"]),
            }
        )
    note = "By chance: the share that a random selection of the other's size would have."
    return table(f"What {name} shares with other selections", rows, note)


@matplotlib.rc_context(plots.LOOK)
def _share_plot(name: str, audit: Mapping[str, Any]) -> Plot:
    """The selected share of each subset, and that of all rows."""
    by_subset = sorted(audit["by_subset"].items(), key=lambda item: item[1]["kept_share"])
    shares = {subset: 100 * part["kept_share"] for subset, part in by_subset}
    places, whole = range(len(shares)), 100 * audit["whole"]["kept_share"]
    figure = Figure(figsize=(6.0, 1.6 + 0.26 * len(shares)), layout="constrained")
    panel = figure.add_subplot()
    panel.barh(places, [*shares.values()], color=PALETTE[0], height=0.7)
    panel.set_yticks(places, [shortened(subset, _LONGEST_NAME) for subset in shares])
    panel.axvline(whole, color=INK, linestyle="--", linewidth=1.2)
    panel.set_xlim(0, 1.1 * max([*shares.values(), whole]))
    panel.set_xlabel("selected (% of the subset's rows)")
    panel.set_title(f"{name}: share of each subset")
    panel.set_ylim(-0.6, len(shares) - 0.4)
    panel.set_axisbelow(True)
    panel.grid(visible=False, axis="y")
    shown = ", ".join(f"{subset} {share:.1f}%" for subset, share in shares.items())
    caption = (
        f"Share of each subset's rows that {name} selected; the dashed line is that of all rows, "
        f"{whole:.1f}%. {shown}."
    )
    return finished_plot("selected_share", caption, figure)


@matplotlib.rc_context(plots.LOOK | {"font.size": 8, "axes.titlesize": 8})
def _histogram_plot(name: str, audit: Mapping[str, Any]) -> Plot:
    """Scores of all and of selected rows: overall, then by subset."""
    parts = [("all rows", audit["whole"]), *audit["by_subset"].items()]
    edges = np.array(audit["score_edges"])
    lines = math.ceil(len(parts) / _COLUMNS)
    figure = Figure(figsize=(7.5, 0.8 + 1.4 * lines), layout="constrained")
    panels = figure.subplots(lines, _COLUMNS, squeeze=False, sharex=True).ravel()
    for panel, (subset, part) in zip(panels, parts, strict=False):
        panel.stairs(part["scores"], edges, fill=True, color=PALE)
        panel.stairs(part["scores_kept"], edges, color=PALETTE[0], linewidth=1.2)
        if (cut := _cut(audit, part)) is not None:
            panel.axvline(cut, color=PALETTE[1], linestyle="--", linewidth=1)
        panel.set_axisbelow(True)
        scale_counts(panel, max(part["scores"]))
        panel.set_title(shortened(subset, _LONGEST_NAME))
    for panel in panels[len(parts) :]:
        panel.set_visible(False)
    figure.supxlabel("score (nats per token)")
    figure.supylabel("rows, logarithmic")
    line = ""
    if audit.get("stratified"):
        cuts = ((subset, part["lowest_kept"]) for subset, part in audit["by_subset"].items())
        listed = ", ".join(f"{subset} {cut:.3f}" for subset, cut in cuts if cut is not None)
        line = f"; the dashed lines are the subsets' cuts: {listed}"
    elif audit["cut"] is not None:
        line = f"; the dashed line is the cut at {audit['cut']:.3f}"
    caption = (
        f"Scores of all rows (filled) and of those that {name} selected (line), in whole and by "
        f"subset{line}."
    )
    return finished_plot("selected_scores", caption, figure)


def _cut(audit: Mapping[str, Any], part: Mapping[str, Any]) -> float | None:
    """The cut of a part's rows; a stratified selection has no single cut for all rows."""
    if not audit.get("stratified"):
        return audit["cut"]
    return None if part is audit["whole"] else part["lowest_kept"]
