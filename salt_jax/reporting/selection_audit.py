"""The audit of a selection as `salt select` prints it and `salt report` shows it.

In: audit.json of a selection. Out: tables, plots and rows to be read.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from salt_jax.reporting import plots
from salt_jax.reporting.plots import INK, PALE, PALETTE, Plot
from salt_jax.reporting.tables import NOTHING, format_count, format_nats, format_share
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
_MOST_OF_A_NAME = 30  # characters, beside bars


@dataclasses.dataclass(frozen=True)
class Excerpts:
    """Rows to be read: what they have in common, and of each a head and its text."""

    title: str
    rows: tuple[tuple[str, str], ...]


def audit_tables(name: str, audit: Mapping[str, Any]) -> list[Table]:
    """What was selected by subset, and what it shares with other selections."""
    tables = [_subset_table(name, audit)]
    if audit["overlaps"]:
        tables.append(_overlap_table(name, audit["overlaps"]))
    return tables


def audit_plots(name: str, audit: Mapping[str, Any]) -> list[Plot]:
    """Kept share and score histogram of each subset; none where it has no scores."""
    if "score_edges" not in audit:
        return []
    return [_share_plot(name, audit), _histogram_plot(name, audit)]


def audit_excerpts(audit: Mapping[str, Any]) -> list[Excerpts]:
    """The rows that the audit shows, by group."""
    return [
        Excerpts(title, tuple(_excerpt(row) for row in audit["examples"][group]))
        for group, title in _GROUPS.items()
        if audit["examples"].get(group)
    ]


def _excerpt(row: Mapping[str, Any]) -> tuple[str, str]:
    head = f"row {row['row_id']:,}, {row['subset']}"
    if row["score"] is not None:
        head += f", score {row['score']:.3f}, {row['learnable']:.1%} learnable"
    return head, row["text"]


def _subset_table(name: str, audit: Mapping[str, Any]) -> Table:
    by_subset = audit["by_subset"]
    parts = [*by_subset.items(), ("all rows", audit["whole"])]
    has_scores, stratified = "score_edges" in audit, audit.get("stratified", False)
    columns = ["subset", "rows", "selected", "share of its rows", "share of selection"]
    if stratified:
        columns.append("cut")
    if has_scores:
        columns += ["mean loss", "of selected", "learnable", "of those selected"]
    rows = []
    for subset, part in parts:
        cells = [subset, format_count(part["rows"]), format_count(part["kept"])]
        cells += [_share(part["kept_share"]), _share(part["share_of_kept"])]
        if stratified:
            cells.append(_nats(_cut(audit, part)))
        if has_scores:
            cells += [_nats(part["log_perplexity"]), _nats(part["log_perplexity_kept"])]
            cells += [_share(part["learnable"]), _share(part["learnable_kept"])]
        rows.append(tuple(cells))
    return Table(f"Selected rows by subset: {name}", tuple(columns), tuple(rows), _note(audit))


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
        sentences.append("By subset it is not known: give the selection scores (--scores).")
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
            (
                short if names.count(short) == 1 else str(other["selection"]),
                ", ".join(what) or str(other["how"].get("rule", NOTHING)),
                format_count(other["rows"]),
                format_count(other["shared"]),
                _share(other["jaccard"]),
                _share(other["share_of_this"]),
                _share(other["share_by_chance"]),
            )
        )
    return Table(
        title=f"What {name} shares with other selections",
        columns=(
            *("selection", "by", "rows", "shared", "Jaccard", f"share of {name}", "by chance"),
        ),
        rows=tuple(rows),
        note="By chance: the share that a random selection of the other one's size would have.",
    )


def _share_plot(name: str, audit: Mapping[str, Any]) -> Plot:
    """Which share of each subset was selected, beside that of all rows."""
    by_subset = sorted(audit["by_subset"].items(), key=lambda item: item[1]["kept_share"])
    names = [subset for subset, _ in by_subset]
    shares = [100 * part["kept_share"] for _, part in by_subset]
    whole = 100 * audit["whole"]["kept_share"]
    with matplotlib.rc_context(plots.LOOK):
        figure = Figure(figsize=(6.0, 1.6 + 0.26 * len(names)), layout="constrained")
        panel = figure.add_subplot()
        panel.barh(range(len(names)), shares, color=PALETTE[0], height=0.7)
        panel.set_yticks(range(len(names)), [shortened(name, _MOST_OF_A_NAME) for name in names])
        panel.axvline(whole, color=INK, linestyle="--", linewidth=1.2)
        panel.set_xlim(0, 1.1 * max([*shares, whole]))
        panel.set_xlabel("selected (% of the subset's rows)")
        panel.set_title(f"{name}: share of each subset")
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.set_axisbelow(True)
        panel.grid(visible=False, axis="y")
        shown = ", ".join(f"{subset} {share:.1f}%" for subset, share in zip(names, shares))  # noqa: B905
        caption = (
            f"Share of each subset's rows that {name} selected; the dashed line is that of all "
            f"rows, {whole:.1f}%. {shown}."
        )
        return Plot("selected_share", caption, figure, plots.to_png(figure))


def _histogram_plot(name: str, audit: Mapping[str, Any]) -> Plot:
    """Scores of all rows and of those selected: in whole, then subset by subset."""
    parts = [("all rows", audit["whole"]), *audit["by_subset"].items()]
    edges = np.array(audit["score_edges"])
    lines = math.ceil(len(parts) / _COLUMNS)
    with matplotlib.rc_context(plots.LOOK | {"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(7.5, 0.8 + 1.4 * lines), layout="constrained")
        panels = figure.subplots(lines, _COLUMNS, squeeze=False, sharex=True).ravel()
        for panel, (subset, part) in zip(panels, parts, strict=False):
            panel.stairs(part["scores"], edges, fill=True, color=PALE)
            panel.stairs(part["scores_kept"], edges, color=PALETTE[0], linewidth=1.2)
            if (cut := _cut(audit, part)) is not None:
                panel.axvline(cut, color=PALETTE[1], linestyle="--", linewidth=1)
            panel.set_yscale("symlog", linthresh=1)
            panel.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
            panel.set_axisbelow(True)
            panel.set_ylim(0, max(2.0, 2.0 * max(part["scores"])))
            panel.set_title(shortened(subset, _MOST_OF_A_NAME))
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
            f"Scores of all rows (filled) and of those that {name} selected (line), in whole and "
            f"by subset{line}."
        )
        return Plot("selected_scores", caption, figure, plots.to_png(figure))


def _cut(audit: Mapping[str, Any], part: Mapping[str, Any]) -> float | None:
    """Where a part's rows are cut: in one place, or each subset in its own and so nowhere for all
    rows."""
    if not audit.get("stratified"):
        return audit["cut"]
    return None if part is audit["whole"] else part["lowest_kept"]


def _share(value: float | None) -> str:
    return NOTHING if value is None else format_share(value)


def _nats(value: float | None) -> str:
    return NOTHING if value is None else format_nats(value)
