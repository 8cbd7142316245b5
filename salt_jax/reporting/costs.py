"""Cost tables: FLOPs, time and tokens of runs, by what they were spent on."""

import math
from collections.abc import Iterator, Sequence

from salt_jax.reporting.runs import FLOPS_PARTS, SECONDS_PARTS, TrainRun
from salt_jax.reporting.tables import (
    NOTHING,
    format_count,
    format_power,
    format_seconds,
    format_share,
    or_none,
    table,
)
from salt_jax.terminal import Table

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
_WALL_TIME = {
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
        name, how = f"teacher: {teacher.name}", "charged" if charged else "not charged"
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
