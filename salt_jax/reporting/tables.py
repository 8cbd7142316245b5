"""The tables of a report, as text cells: the page and the terminal show the same ones.

In: runs, runs at a common cost, scores and selections. Out: Table.
"""

import math
from collections.abc import Sequence

import numpy as np

from salt_jax.reporting.comparison import FLOPS, SECONDS, STEPS, Axis, Matched
from salt_jax.reporting.runs import ScoreFolder, SelectionFolder, TrainRun
from salt_jax.terminal import Table

NOTHING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def final_table(runs: Sequence[TrainRun]) -> Table:
    """Every run's result at its end."""
    unfinished = [run.label for run in runs if not run.finished]
    note = (
        f"Not finished, so as of the last evaluation: {', '.join(unfinished)}."
        if unfinished
        else ""
    )
    return Table(
        title="Results at the end of each run",
        columns=(
            *("arm", "steps", "log-perplexity", "next-token accuracy", "train FLOPs"),
            *("time", "tokens", "parameters", "skipped updates"),
        ),
        rows=tuple(_final_row(run) for run in runs),
        note=note,
    )


def matched_table(found: Matched) -> Table:
    """Runs at equal steps, equal train FLOPs or equal time."""
    charged = any(one.costs.teacher_training_flops for _, one in found.readings if one)
    rows = []
    for label, reading in found.readings:
        if reading is None:
            rows.append((label, *[NOTHING] * 6))
            continue
        sign = "≈ " if reading.interpolated else ""
        parts = reading.costs.flops_parts
        rows.append(
            (
                label,
                format_nats(reading.log_perplexity),
                format_share(reading.next_token_accuracy),
                sign + format_count(reading.step),
                format_power(reading.train_flops),
                format_parts(parts if charged else parts[:3]),
                format_seconds(reading.seconds),
            )
        )
    made = " + making the teacher" if charged else ""
    return Table(
        title=f"At equal {found.axis.title}: {format_cost(found.axis, found.value)}",
        columns=(
            *("arm", "log-perplexity", "next-token accuracy", "steps by then"),
            *("train FLOPs by then", f"student + teacher + scoring{made} (%)", "time by then"),
        ),
        rows=tuple(rows),
        note=_MATCHED_NOTES[found.axis.name],
    )


def subset_table(runs: Sequence[TrainRun]) -> Table | None:
    """Final log-perplexity and accuracy by subset; None when no run measured more than one."""
    results = {run.label: run.final.by_subset if run.final else {} for run in runs}
    tokens: dict[str, float] = {}
    for by_subset in results.values():
        for name, result in by_subset.items():
            tokens[name] = max(tokens.get(name, 0.0), result.tokens)
    if len(tokens) < 2:
        return None
    rows = []
    for name in sorted(tokens, key=lambda name: (-tokens[name], name)):
        found = [results[run.label].get(name) for run in runs]
        cells = [
            f"{format_nats(one.log_perplexity)} / {format_share(one.next_token_accuracy)}"
            if one
            else NOTHING
            for one in found
        ]
        rows.append((name, format_count(tokens[name]), *cells))
    return Table(
        title="By subset",
        columns=("subset", "held-out tokens", *(run.label for run in runs)),
        rows=tuple(rows),
        note="Log-perplexity / next-token accuracy at the end of each run.",
    )


def scores_table(scores: Sequence[ScoreFolder]) -> Table:
    """What each score folder holds."""
    rows = []
    for scored in scores:
        finite = scored.scores[np.isfinite(scored.scores)]
        scorer = scored.manifest.get("scorer") or {}
        middle = format_nats(float(np.median(finite))) if finite.size else NOTHING
        rows.append(
            (
                scored.origin.path.name,
                format_count(scored.scores.size),
                format_count(scored.scores.size - finite.size),
                middle,
                scored.column,
                ", ".join(map(str, scored.manifest["k"])),
                str(scorer.get("step", NOTHING)),
            )
        )
    return Table(
        title="Scores",
        columns=(
            *("scores", "rows", "without a score", "median score", "shown", "k"),
            "scorer's step",
        ),
        rows=tuple(rows),
        note="Scores are in nats per token. A row without a score (−∞) has too few learnable "
        "tokens and is never selected.",
    )


def selections_table(selections: Sequence[SelectionFolder]) -> Table:
    """What each selection folder holds."""
    rows = []
    for selected in selections:
        how = selected.manifest.get("how") or {}
        rows.append(
            (
                selected.name,
                format_count(selected.row_ids.size),
                NOTHING if selected.cut is None else format_nats(selected.cut),
                ", ".join(f"{name} {value}" for name, value in how.items()) or NOTHING,
            )
        )
    return Table(
        title="Selections",
        columns=("selection", "rows", "lowest score selected", "how"),
        rows=tuple(rows),
    )


def format_nats(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def format_share(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "not finite"


def format_count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "not finite"


def format_power(value: float) -> str:
    """1.234e15 as 1.234 × 10¹⁵."""
    if not math.isfinite(value):
        return "not finite"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{digits} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}" if value else "0"


def format_parts(values: Sequence[float]) -> str:
    """The shares of a sum in percent: 97.1 + 2.9 + 0.0."""
    total = sum(values)
    if not math.isfinite(total) or not total:
        return NOTHING
    return " + ".join(f"{100 * value / total:.1f}" for value in values)


def format_seconds(value: float) -> str:
    """Seconds in the unit that suits them."""
    if not math.isfinite(value):
        return "not finite"
    name, seconds = time_unit(value)
    return f"{value / seconds:,.1f} {name}"


def time_unit(value: float) -> tuple[str, float]:
    """The unit that suits a time in seconds, and how many seconds it has."""
    if value < 600:
        return "s", 1.0
    return ("min", 60.0) if value < 6 * 3600 else ("h", 3600.0)


def format_cost(axis: Axis, value: float) -> str:
    """A value of an axis with its unit."""
    if axis == FLOPS:
        return format_power(value)
    return format_seconds(value) if axis == SECONDS else format_count(value)


def _final_row(run: TrainRun) -> tuple[str, ...]:
    final = run.final
    size = NOTHING if run.parameters is None else format_count(run.parameters)
    skipped = format_count(run.skipped_updates)
    if final is None:
        return (run.label, format_count(run.last_step), *[NOTHING] * 5, size, skipped)
    return (
        run.label,
        format_count(final.step),
        format_nats(final.log_perplexity),
        format_share(final.next_token_accuracy),
        format_power(final.train_flops),
        format_seconds(final.seconds),
        format_count(final.tokens),
        size,
        skipped,
    )


_SCHEDULE_CAVEAT = (
    "An arm that costs less per step is read at its end, a dearer one before its end, while its "
    "learning rate is still to fall: that favours the cheaper arm."
)
_MATCHED_NOTES = {
    STEPS.name: "The largest number of steps at which every arm has been evaluated.",
    FLOPS.name: "The largest train FLOPs that every arm reached; ≈ marks figures interpolated "
    f"linearly between two evaluations. {_SCHEDULE_CAVEAT}",
    SECONDS.name: "The longest time that every arm trained, as measured on its machine; ≈ marks "
    f"figures interpolated linearly between two evaluations. {_SCHEDULE_CAVEAT}",
}
