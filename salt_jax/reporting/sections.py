"""What a report says, in which order.

In: the material read from run folders. Out: sections of text, tables and plots, and the same
results as numbers for summary.json.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import InputError, nearest
from salt_jax.reporting import (
    cost_tables,
    plots,
    seed_tables,
    seeds,
    selection_audit,
    stability,
    tables,
)
from salt_jax.reporting.comparison import (
    AXES,
    FLOPS,
    SECONDS,
    Axis,
    Matched,
    Reading,
    charged_for_their_teachers,
    comparable_groups,
    matched,
    seeds_sentence,
)
from salt_jax.reporting.plots import Plot, Style
from salt_jax.reporting.runs import Material, ScoreFolder, SelectionFolder, TrainRun
from salt_jax.reporting.selection_audit import Excerpts
from salt_jax.terminal import Table

# {teachers} is what is added when the arms are charged for making their teachers.
_FLOPS_SENTENCE = (
    "Train FLOPs are the sum of the student's passes, the teacher's forward pass in stage 1, and "
    "the scoring that a run's selection needed{teachers}. Evaluation is not in them."
)
_TIME_SENTENCE = (
    "Training time is the sum of the steps of both stages and the scoring that a run's selection "
    "needed{teachers}. Evaluation, compiling and checkpoints are not in it."
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: its text, then its tables, its plots, and rows to be read."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    excerpts: tuple[Excerpts, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a page shows but its head, and the numbers behind it.

    Attributes:
      summary_sentences: What is compared, and what may be concluded.
      sections: In reading order.
      looks: How each run is drawn, by label.
      numbers: For summary.json; strict JSON values only.
    """

    summary_sentences: tuple[str, ...]
    sections: tuple[Section, ...]
    looks: Mapping[str, Style]
    numbers: Mapping[str, Any]

    @property
    def plots(self) -> tuple[Plot, ...]:
        return tuple(plot for section in self.sections for plot in section.plots)

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(table for section in self.sections for table in section.tables)


def compose(
    material: Material, charge_teacher_training: bool = False, reference: str = seeds.REFERENCE
) -> Report:
    """Makes the whole report from what the run folders hold.

    Args:
      material: The runs, scores and selections.
      charge_teacher_training: Whether an arm's costs include those of training its teacher.
      reference: The arm that others are compared with over seeds.
    """
    if charge_teacher_training:
        material = dataclasses.replace(material, runs=charged_for_their_teachers(material.runs))
    runs = material.runs
    _require_reference(reference, runs)
    groups = comparable_groups(runs)
    compared = [group for group in groups if len(group) > 1]
    alone = [run for group in groups if len(group) == 1 for run in group]
    foreground = [run for group in compared for run in group] or alone
    looks = {
        **{run.label: plots.IN_THE_BACKGROUND for run in alone},
        **_looks(foreground),
    }
    sections: list[Section] = []
    found: list[Matched] = []
    over_seeds: list[seeds.ArmOverSeeds] = []
    if runs:
        notes = [f"{run.label}: {_unreadable(run)}" for run in runs if run.unreadable_lines]
        sections.append(Section("Results", tuple(notes), (tables.final_table(runs),)))
    for number, group in enumerate(compared, start=1):
        suffix = f"_{number}" if len(compared) > 1 else ""
        matches = [match for axis in AXES if (match := matched(group, axis))]
        found += matches
        if seeds.arms_repeat(group):
            arms = seeds.over_seeds(group, reference)
            over_seeds += arms
            sections += _seed_sections(group, arms, looks, suffix, reference)
        else:
            sections += _comparison_sections(group, alone, looks, matches, suffix)
    if alone and not compared:
        sections += _comparison_sections(alone, [], looks, [], "")
    if runs:
        sections.append(_cost_section(runs, charge_teacher_training))
        sections += _stability_sections(runs)
    by_subset = tables.subset_table(runs)
    if by_subset:
        sections.append(Section("Results by subset", (), (by_subset,)))
    sections += _score_sections(material.scores, material.selections)
    sections += _audit_sections(material.selections)
    return Report(
        summary_sentences=_summary_sentences(material),
        sections=tuple(sections),
        looks=looks,
        numbers={
            **_numbers(material, found),
            "over_seeds": [_without_nan(dataclasses.asdict(one)) for one in over_seeds],
        },
    )


def _looks(runs: Sequence[TrainRun]) -> dict[str, Style]:
    """By label and by arm; where an arm has several seeds, they look like their arm."""
    by_arm = plots.styles({run.arm: run.arm for run in runs})
    if seeds.arms_repeat(runs):
        return {**{run.label: by_arm[run.arm] for run in runs}, **by_arm}
    return {**by_arm, **plots.styles({run.label: run.arm for run in runs})}


def _require_reference(reference: str, runs: Sequence[TrainRun]) -> None:
    """The default may be missing; one that was asked for may not."""
    arms = sorted({run.arm for run in runs})
    if reference != seeds.REFERENCE and reference not in arms:
        raise InputError(
            f"reference is {reference!r}{nearest(reference, arms)}, and the arms are "
            f"{', '.join(arms)}: name one of them."
        )


def _seed_sections(
    group: Sequence[TrainRun],
    arms: Sequence[seeds.ArmOverSeeds],
    looks: Mapping[str, Style],
    suffix: str,
    reference: str,
) -> list[Section]:
    """Arms over their seeds: at the end, then against each cost."""
    shown = {arm: list(runs.values()) for arm, runs in seeds.by_arm(group).items()}
    sections = [
        Section("Over seeds", tables=(seed_tables.final_seeds_table(arms, reference),)),
    ]
    for axis, value in seeds.common_values(group).items():
        table = seed_tables.equal_cost_table(arms, axis, value, reference)
        images = tuple(
            _renamed(plots.band_plot(shown, looks, axis, metric), suffix)
            for metric in (plots.LOG_PERPLEXITY, plots.ACCURACY)
        )
        text = _charged_sentences(axis, group)
        sections.append(Section(f"Against {axis.title}", text, (table,), images))
    return sections


def _comparison_sections(
    group: Sequence[TrainRun],
    others: Sequence[TrainRun],
    looks: Mapping[str, Style],
    matches: Sequence[Matched],
    suffix: str,
) -> list[Section]:
    """Evaluation curves against each cost, with the arms at equal cost, then the training loss."""
    sizes = {run.parameters for run in group}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    of_size = f" ({size:,} parameters)" if suffix and size else ""
    by_axis = {match.axis.name: match for match in matches}
    sections = []
    if any(run.evaluations for run in group):
        for axis in AXES:
            match = by_axis.get(axis.name)
            sections.append(
                Section(
                    title=f"Against {axis.title}{of_size}",
                    text=_charged_sentences(axis, group),
                    tables=(tables.matched_table(match),) if match else (),
                    plots=tuple(
                        _renamed(plots.evaluation_plot(group, others, looks, axis, metric), suffix)
                        for metric in (plots.LOG_PERPLEXITY, plots.ACCURACY)
                    ),
                )
            )
    if any(run.training for run in group):
        plot = _renamed(plots.training_plot(group, looks), suffix)
        sections.append(Section(f"Training loss{of_size}", plots=(plot,)))
    return sections


def _stability_sections(runs: Sequence[TrainRun]) -> list[Section]:
    switch, found = stability.switch_table(runs), stability.spikes_table(runs)
    shown = tuple(table for table in (switch, found) if table)
    sentences = () if found else ("No run's training loss has a spike.",)
    return [Section("Stability", sentences, shown)] if shown else []


def _cost_section(runs: Sequence[TrainRun], charged: bool) -> Section:
    teachers = cost_tables.TEACHERS_CHARGED if charged else cost_tables.TEACHERS_NOT_CHARGED
    return Section(
        "What the runs cost",
        (*cost_tables.CHARGED, teachers),
        (
            cost_tables.flops_table(runs, charged),
            cost_tables.time_table(runs, charged),
            cost_tables.tokens_table(runs),
        ),
    )


def _charged_sentences(axis: Axis, runs: Sequence[TrainRun]) -> tuple[str, ...]:
    """What the costs on an axis consist of."""
    sentence = {FLOPS: _FLOPS_SENTENCE, SECONDS: _TIME_SENTENCE}.get(axis)
    charged = any(run.costs.teacher_training_flops for run in runs)
    teachers = ", and the training of its teacher" if charged else ""
    return (sentence.format(teachers=teachers),) if sentence else ()


def _score_sections(
    scores: Sequence[ScoreFolder], selections: Sequence[SelectionFolder]
) -> list[Section]:
    """Each score folder with what was selected by it, or at random from the same rows."""
    if not scores and not selections:
        return []
    drawn = []
    for scored in scores:
        own = [selected for selected in selections if _belongs(selected, scored)]
        by_score = [one for one in own if one.manifest.get("score")]
        at_random = [one for one in own if one not in by_score]
        # One plot for each score that selections were made by, or for the usual one.
        columns = {str(one.manifest["score"]): one.manifest["score"] for one in by_score}
        for score in columns.values():
            same = [one for one in by_score if one.manifest["score"] == score]
            drawn.append((scored.by(score), [*same, *at_random]))
        if not columns:
            drawn.append((scored, own))
    images = [
        _renamed(plots.score_plot(*each), f"_{number}" if len(drawn) > 1 else "")
        for number, each in enumerate(drawn, start=1)
    ]
    placed = [one for one in selections if any(_belongs(one, scored) for scored in scores)]
    missing = [one.name for one in selections if one not in placed]
    text = (
        f"The scores that these selections were made from were not given: {', '.join(missing)}.",
    )
    shown = [tables.scores_table(scores)] if scores else []
    shown += [tables.selections_table(selections)] if selections else []
    return [Section("Scores of rows", text if missing else (), tuple(shown), tuple(images))]


def _audit_sections(selections: Sequence[SelectionFolder]) -> list[Section]:
    """What each selection took and left."""
    sections = []
    for number, selected in enumerate(selections, start=1):
        if selected.audit is None:
            continue
        suffix = f"_{number}" if len(selections) > 1 else ""
        images = selection_audit.audit_plots(selected.name, selected.audit)
        sections.append(
            Section(
                title=f"Audit of {selected.name}",
                tables=tuple(selection_audit.audit_tables(selected.name, selected.audit)),
                plots=tuple(_renamed(image, suffix) for image in images),
                excerpts=tuple(selection_audit.audit_excerpts(selected.audit)),
            )
        )
    return sections


def _belongs(selected: SelectionFolder, scored: ScoreFolder) -> bool:
    """Whether a selection was made from these scores; a random control, from the same rows."""
    if selected.scores_digest is not None:
        return selected.scores_digest == scored.digest
    if selected.row_ids.max(initial=-1) >= scored.rows.rows:
        return False
    same = ("cache_digest", "split")
    return all(selected.manifest.get(name) == scored.manifest.get(name) for name in same)


def _renamed(plot: Plot, suffix: str) -> Plot:
    return dataclasses.replace(plot, name=plot.name + suffix)


def _unreadable(run: TrainRun) -> str:
    number = run.unreadable_lines
    lines = "one line of its metrics was" if number == 1 else f"{number} lines of its metrics were"
    return f"{lines} cut short and left out."


def _summary_sentences(material: Material) -> tuple[str, ...]:
    counts = [
        (len(material.runs), "training run"),
        (len(material.scores), "score folder"),
        (len(material.selections), "selection"),
    ]
    named = [f"{number} {noun}{'s' if number > 1 else ''}" for number, noun in counts if number]
    sentences = [f"Made from {', '.join(named)}."]
    if material.runs:
        sentences.append(
            "Log-perplexity is the mean next-token loss on held-out text, in nats per token (lower "
            "is better); next-token accuracy is how often the most likely token is the true one."
        )
        sentences.append(seeds_sentence(material.runs))
    return tuple(sentences)


def _numbers(material: Material, found: Sequence[Matched]) -> dict[str, Any]:
    return {
        "runs": [_run_numbers(run) for run in material.runs],
        "matched": [
            {
                "axis": match.axis.name,
                "value": match.value,
                "arms": [
                    {"label": label, **(_reading_numbers(reading) if reading else {})}
                    for label, reading in match.readings
                ],
            }
            for match in found
        ],
        "scores": [
            {"path": str(scored.origin.path), "rows": scored.rows.rows}
            for scored in material.scores
        ],
        "selections": [
            {
                "path": str(selected.origin.path),
                "rows": int(selected.row_ids.size),
                "cut": selected.cut,
            }
            for selected in material.selections
        ],
    }


def _reading_numbers(reading: Reading) -> dict[str, Any]:
    numbers = dataclasses.asdict(reading)
    return {**_finite(numbers), "costs": _finite(numbers["costs"])}


def _run_numbers(run: TrainRun) -> dict[str, Any]:
    final, made = run.final, run.teacher_training
    return {
        "label": run.label,
        "arm": run.arm,
        "path": str(run.origin.path),
        "finished": run.finished,
        "seed": run.seed,
        "parameters": run.parameters,
        "switch_step": run.switch_step,
        "steps": run.last_step,
        "skipped_updates": run.skipped_updates,
        **_finite(
            {
                field: getattr(final, field) if final else None
                for field in (
                    *("log_perplexity", "next_token_accuracy"),
                    *("train_flops", "tokens", "seconds"),
                )
            }
        ),
        "costs": _finite(dataclasses.asdict(run.costs)),
        "teacher_training": _finite(
            {"teacher": made.name, "train_flops": made.train_flops, "seconds": made.seconds}
            if made
            else {}
        )
        or None,
    }


def _without_nan(value: Any) -> Any:
    """The same, all the way down, with None for what strict JSON cannot say."""
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for what strict JSON cannot say."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
