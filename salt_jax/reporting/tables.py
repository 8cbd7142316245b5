"""The tables of a report as text, for the page and the terminal."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from salt_jax.reporting.comparison import FLOPS, SECONDS, STEPS, Axis, Matched
from salt_jax.reporting.runs import (
    FLOPS_PARTS,
    QUALITY,
    SECONDS_PARTS,
    ScoreFolder,
    SelectionFolder,
    TrainRun,
)
from salt_jax.terminal import Table

NOTHING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Format = Callable[[float | None], str]


def _or_nothing(form: Callable[[float], str]) -> Format:
    """A format that also shows missing values (None) and those that are not finite."""

    def shown(value: float | None) -> str:
        if value is None:
            return NOTHING
        return form(value) if math.isfinite(value) else "not finite"

    return shown


def or_none(value: float) -> float | None:
    """None for NaN, where that means unknown."""
    return None if math.isnan(value) else value


format_nats = _or_nothing("{:.3f}".format)
format_share = _or_nothing("{:.2%}".format)
format_count = _or_nothing("{:,.0f}".format)


@_or_nothing
def format_power(value: float) -> str:
    """1.234e15 as 1.234 × 10¹⁵."""
    digits, exponent = f"{value:.3e}".split("e")
    return f"{digits} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}" if value else "0"


@_or_nothing
def format_seconds(value: float) -> str:
    """Seconds as text in a suitable unit."""
    name, seconds = time_unit(value)
    return f"{value / seconds:,.1f} {name}"


def time_unit(value: float) -> tuple[str, float]:
    """A suitable unit for a time in seconds, and the unit's seconds."""
    if value < 600:
        return "s", 1.0
    return ("min", 60.0) if value < 6 * 3600 else ("h", 3600.0)


def format_cost(axis: Axis, value: float) -> str:
    """A value of an axis with its unit."""
    return {FLOPS: format_power, SECONDS: format_seconds}.get(axis, format_count)(value)


def format_parts(values: Sequence[float]) -> str:
    """The shares of a sum in percent: 97.1 + 2.9 + 0.0."""
    total = sum(values)
    if not math.isfinite(total) or not total:
        return NOTHING
    return " + ".join(f"{100 * value / total:.1f}" for value in values)


def table(title: str, rows: Sequence[Mapping[str, str]], note: str = "") -> Table:
    """A table of at least one row; the rows' keys are the headings."""
    return Table(title, tuple(rows[0]), tuple(tuple(row.values()) for row in rows), note)


def final_table(runs: Sequence[TrainRun]) -> Table:
    """Every run's final results."""
    rows = []
    for run in runs:
        final = {} if run.final is None else run.final
        rows.append(
            {
                "arm": run.label,
                "steps": format_count(final.get("step", run.last_step)),
                "log-perplexity": format_nats(final.get("log_perplexity")),
                "next-token accuracy": format_share(final.get("next_token_accuracy")),
                "train FLOPs": format_power(final.get("train_flops")),
                "time": format_seconds(final.get("seconds")),
                "tokens": format_count(final.get("tokens")),
                "parameters": format_count(run.parameters),
                "skipped updates": format_count(run.skipped_updates),
            }
        )
    unfinished = ", ".join(run.label for run in runs if not run.finished)
    note = f"Not finished, so as of the last evaluation: {unfinished}." if unfinished else ""
    return table("Results at the end of each run", rows, note)


_SCHEDULE_CAVEAT = (
    "An arm that costs less per step is read at its end, a more expensive one before its end, "
    "where its learning rate has not decayed yet: that favours the cheaper arm."
)
_INTERPOLATED = "≈ marks figures interpolated linearly between two evaluations. " + _SCHEDULE_CAVEAT
_MATCHED_NOTES = {
    STEPS: "The largest number of steps at which every arm has been evaluated.",
    FLOPS: "The largest train FLOPs that every arm reached; " + _INTERPOLATED,
    SECONDS: "The longest time that every arm trained, as measured on its machine; "
    + _INTERPOLATED,
}


def matched_table(found: Matched) -> Table:
    """Runs at equal steps, equal train FLOPs or equal time."""
    charged = bool((found.readings[FLOPS_PARTS[-1]] > 0).any())
    parts = list(FLOPS_PARTS if charged else FLOPS_PARTS[:-1])
    named = "student + teacher + scoring" + " + training the teacher" * charged
    rows = []
    for label, reading in found.readings.iterrows():
        known = {} if math.isnan(reading["step"]) else reading
        sign = "≈ " if reading["interpolated"] > 0 else ""
        rows.append(
            {
                "arm": label,
                "log-perplexity": format_nats(known.get("log_perplexity")),
                "next-token accuracy": format_share(known.get("next_token_accuracy")),
                "steps by then": sign + format_count(known.get("step")),
                "train FLOPs by then": format_power(known.get("train_flops")),
                f"{named} (%)": format_parts(reading[parts]),
                "time by then": format_seconds(known.get("seconds")),
            }
        )
    title = f"At equal {found.axis.title}: {format_cost(found.axis, found.value)}"
    return table(title, rows, _MATCHED_NOTES[found.axis])


def subset_table(runs: Sequence[TrainRun]) -> Table | None:
    """Final log-perplexity and accuracy by subset; None if no run has more than one."""
    tokens = pd.concat([run.by_subset["tokens"] for run in runs], axis=1).max(axis=1)
    if len(tokens) < 2:
        return None

    def cell(name: str, run: TrainRun) -> str:
        if name not in run.by_subset.index:
            return NOTHING
        nats, share = run.by_subset.loc[name, [*QUALITY]]
        return f"{format_nats(nats)} / {format_share(share)}"

    return Table(
        "By subset",
        ("subset", "held-out tokens", *(run.label for run in runs)),
        tuple(
            (name, format_count(tokens[name]), *(cell(name, run) for run in runs))
            for name in sorted(tokens.index, key=lambda name: (-tokens[name], name))
        ),
        "Log-perplexity / next-token accuracy at the end of each run.",
    )


def scores_table(scores: Sequence[ScoreFolder]) -> Table:
    """A row for each score folder."""
    rows = []
    for scored in scores:
        finite = scored.scores[np.isfinite(scored.scores)]
        scorer = scored.rows.manifest.get("scorer") or {}
        rows.append(
            {
                "scores": scored.name,
                "rows": format_count(scored.scores.size),
                "without a score": format_count(scored.scores.size - finite.size),
                "median score": format_nats(float(np.median(finite)) if finite.size else None),
                "shown": scored.score.column,
                "k": ", ".join(map(str, scored.rows.manifest["k"])),
                "scorer's step": str(scorer.get("step", NOTHING)),
            }
        )
    note = (
        "Scores are in nats per token. A row without a score (−∞) has too few learnable tokens and "
        "is never selected."
    )
    return table("Scores", rows, note)


def selections_table(selections: Sequence[SelectionFolder]) -> Table:
    """A row for each selection folder."""
    rows = []
    for selected in selections:
        how = selected.selection.manifest["how"]
        rows.append(
            {
                "selection": selected.name,
                "rows": format_count(selected.selection.row_ids.size),
                "lowest score selected": format_nats(selected.cut),
                "how": ", ".join(f"{name} {value}" for name, value in how.items()) or NOTHING,
            }
        )
    return table("Selections", rows)


# The columns of each table, by their names in `TrainRun.costs`, and their headings.
_SPENT_BEFORE = ("scoring", "training the teacher")
_FLOPS = {
    **dict(zip(FLOPS_PARTS, ("student", "teacher", *_SPENT_BEFORE), strict=True)),
    "train_flops": "train FLOPs, their sum",
    "evaluation_flops": "evaluation, not charged",
}
_TIME = {
    **dict(zip(SECONDS_PARTS, ("stage 1", "stage 2", *_SPENT_BEFORE), strict=True)),
    "seconds": "time, their sum",
    "evaluation_seconds": "evaluation, not charged",
    "compile_seconds": "compiling, not charged",
}
_WALL_TIME: Mapping[str, tuple[str, Callable[[float], str]]] = {
    **{"starts": ("starts", format_count), "wall_seconds": ("wall time", format_seconds)},
    "goodput": ("goodput", format_share),
    **{
        f"{part}_seconds": (head, format_seconds)
        for part, head in {
            **{"steps": "steps", "start": "starting", "compile": "compiling"},
            **{"restore": "restoring", "save": "saving", "evaluation": "evaluation"},
            **{"rows": "waiting for rows", "lost_steps": "lost steps"},
        }.items()
    },
    **{"chip_hours": ("chip-hours", "{:,.2f}".format), "cost": ("cost", "{:,.2f}".format)},
    "seconds_left": ("time left", format_seconds),
}
_TOKENS = {
    "stage1_tokens": "stage 1",
    "stage2_tokens": "stage 2",
    "tokens": "trained on, their sum",
    "scoring_tokens": "scored",
}


def cost_tables(runs: Sequence[TrainRun], charged: bool) -> list[Table]:
    """FLOPs, time and tokens by what they were spent on, of every run and of every teacher once.

    `charged` says whether the runs are charged for training their teachers.
    """
    costs = [(run.label, run.costs) for run in runs]
    notes = []
    for teacher in {run.teacher.digest: run.teacher for run in runs if run.teacher}.values():
        name, how = (
            f"teacher: {teacher.name} at step {teacher.step}",
            "charged" if charged else "not charged",
        )
        taught = [r.label for r in runs if r.teacher and r.teacher.digest == teacher.digest]
        costs.append((name, teacher.costs))
        notes.append(
            f"{name} is the cost of training the teacher of {', '.join(taught)}: "
            f"{how if teacher.cost_is_known else 'not known, and not charged'}."
        )
    measured = "As measured on each run's own machine; scoring includes compiling."
    found = []
    for title, columns, form, note in (
        ("Model FLOPs by what they were spent on", _FLOPS, format_power, " ".join(notes)),
        ("Time by what it was spent on", _TIME, format_seconds, measured),
        ("Tokens", _TOKENS, format_count, ""),
    ):
        shown = {c: head for c, head in columns.items() if charged or head != _SPENT_BEFORE[-1]}
        rows = [
            {"arm": name, **{head: form(or_none(cost[column])) for column, head in shown.items()}}
            for name, cost in costs
        ]
        found.append(table(title, rows, note))
    return [*found, *_wall_time_table([run for run in runs if run.wall_time["wall_seconds"] > 0])]


def _wall_time_table(runs: Sequence[TrainRun]) -> Iterator[Table]:
    """What the wall time of all starts went to, of runs that recorded it."""
    if not runs:
        return
    shown = {
        name: column
        for name, column in _WALL_TIME.items()
        if any(math.isfinite(run.wall_time[name]) for run in runs)
    }
    rows = [
        {"arm": run.label}
        | {
            head: form(run.wall_time[name]) if math.isfinite(run.wall_time[name]) else NOTHING
            for name, (head, form) in shown.items()
        }
        for run in runs
    ]
    note = "Over all starts of a run, without the time between them; goodput is the share of steps."
    yield table("Wall time", rows, note)
