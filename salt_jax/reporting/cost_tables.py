"""The tables of what runs cost, and the sentences that say what of it is charged.

In: runs, with their costs by part. Out: Table.
"""

import math
from collections.abc import Sequence

from salt_jax.reporting.costs import Costs, TeacherTraining
from salt_jax.reporting.runs import TrainRun
from salt_jax.reporting.tables import (
    NOTHING,
    format_count,
    format_power,
    format_seconds,
)
from salt_jax.terminal import Table

CHARGED = (
    "What is charged to an arm, and made equal where arms are compared at equal FLOPs or equal "
    "time: the student's passes, in stage 1 the teacher's forward pass, and, where rows were "
    "chosen by score, the scoring of every row. FLOPs are model FLOPs: what rematerialisation does "
    "twice counts once.",
    "What is not charged: evaluation, and compiling and checkpoints in time.",
)
TEACHERS_NOT_CHARGED = (
    "Training the teacher is not charged either, since one small model serves many runs; it has a "
    "line of its own where its cost is known. `salt report --charge_teacher_training=True` charges "
    "it to every arm that has a teacher."
)
TEACHERS_CHARGED = (
    "Training the teacher is charged, whole, to every arm that has one, from its first step on "
    "(charge_teacher_training)."
)


def flops_table(runs: Sequence[TrainRun], charged: bool) -> Table:
    """Train FLOPs of every run by what they were spent on, and those of making its teacher.

    Args:
      runs: The runs, charged for their teachers or not.
      charged: Whether they are.
    """
    made = ("making the teacher",) if charged else ()

    def row(name: str, costs: Costs, known: float) -> tuple[str, ...]:
        parts = costs.flops_parts
        cells = (*parts[: len(parts) - (not charged)], _sum(parts, known), costs.evaluation_flops)
        return (name, *map(_power, cells))

    rows = [
        row(run.label, run.costs, run.final.train_flops if run.final else math.nan) for run in runs
    ]
    teachers = distinct_teachers(runs)
    rows += [row(_teacher_name(one), one.costs, one.train_flops) for one in teachers]
    return Table(
        title="Model FLOPs by what they were spent on",
        columns=(
            *("arm", "student", "teacher", "scoring", *made),
            *("train FLOPs, their sum", "evaluation, not charged"),
        ),
        rows=tuple(rows),
        note=_teachers_note(runs, teachers, charged),
    )


def time_table(runs: Sequence[TrainRun], charged: bool) -> Table:
    """Time of every run by what it was spent on; arguments as of flops_table."""
    made = ("making the teacher",) if charged else ()

    def row(name: str, costs: Costs, known: float) -> tuple[str, ...]:
        parts = costs.seconds_parts
        cells = (*parts[: len(parts) - (not charged)], _sum(parts, known))
        cells += (costs.evaluation_seconds, costs.compile_seconds)
        return (name, *map(_seconds, cells))

    rows = [row(run.label, run.costs, run.final.seconds if run.final else math.nan) for run in runs]
    rows += [row(_teacher_name(one), one.costs, one.seconds) for one in distinct_teachers(runs)]
    return Table(
        title="Time by what it was spent on",
        columns=(
            *("arm", "stage 1", "stage 2", "scoring", *made, "time, their sum"),
            *("evaluation, not charged", "compiling, not charged"),
        ),
        rows=tuple(rows),
        note="As measured on each run's own machine, scoring with its compiling.",
    )


def tokens_table(runs: Sequence[TrainRun]) -> Table:
    """Tokens that every run, and the training of its teacher, read."""

    def row(name: str, costs: Costs, known: float) -> tuple[str, ...]:
        trained = (costs.stage1_tokens, costs.stage2_tokens)
        return (name, *map(_count, (*trained, _sum(trained, known), costs.scoring_tokens)))

    rows = [row(run.label, run.costs, run.final.tokens if run.final else math.nan) for run in runs]
    rows += [row(_teacher_name(one), one.costs, one.tokens) for one in distinct_teachers(runs)]
    return Table(
        title="Tokens",
        columns=("arm", "stage 1", "stage 2", "trained on, their sum", "scored"),
        rows=tuple(rows),
    )


def distinct_teachers(runs: Sequence[TrainRun]) -> tuple[TeacherTraining, ...]:
    """Every teacher of these runs once."""
    found = {one.digest: one for run in runs if (one := run.teacher_training)}
    return tuple(found.values())


def _teachers_note(
    runs: Sequence[TrainRun], teachers: Sequence[TeacherTraining], charged: bool
) -> str:
    sentences = []
    for teacher in teachers:
        taught = [
            run.label
            for run in runs
            if run.teacher_training and run.teacher_training.digest == teacher.digest
        ]
        how = "charged" if charged else "not charged"
        if not teacher.known:
            how = "not known, and not charged"
        sentences.append(
            f"{_teacher_name(teacher)} is what it took to train the teacher of "
            f"{', '.join(taught)}: {how}."
        )
    return " ".join(sentences)


def _teacher_name(teacher: TeacherTraining) -> str:
    return f"teacher: {teacher.name}"


def _sum(parts: Sequence[float], known: float) -> float:
    """The sum of the parts; what another version's run says of it where they are not known."""
    return known if any(map(math.isnan, parts)) else sum(parts)


def _power(value: float) -> str:
    return NOTHING if math.isnan(value) else format_power(value)


def _seconds(value: float) -> str:
    return NOTHING if math.isnan(value) else format_seconds(value)


def _count(value: float) -> str:
    return NOTHING if math.isnan(value) else format_count(value)
