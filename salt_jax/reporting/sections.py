"""The sections of a report in order, with their texts, tables, plots and numbers."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError, nearest
from salt_jax.evaluation import paired_comparison
from salt_jax.reporting import ladder, paired, plots, seeds, selection_audit, stability, tables
from salt_jax.reporting.comparison import (
    AXES,
    Axis,
    Matched,
    charged_for_teacher,
    comparable_groups,
    matched,
)
from salt_jax.reporting.ladder import Ladder
from salt_jax.reporting.plots import Plot, Style
from salt_jax.reporting.runs import (
    FLOPS_PARTS,
    PARTS,
    QUALITY,
    SUMS,
    Material,
    ScoreFolder,
    SelectionFolder,
    TrainRun,
)
from salt_jax.terminal import Table


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: its text, then tables, plots, and example rows.

    `kind` is the name of its text in page.html, and `facts` are that template's variables. The
    tables of `details` are on the page alone, not in the terminal.
    """

    title: str
    kind: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    excerpts: Mapping[str, Sequence[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    details: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of a page: its sections in reading order, the style of each run by label, and
    the numbers for summary.json."""

    material: Material
    sections: Sequence[Section]
    looks: Mapping[str, Style]
    numbers: Mapping[str, Any]

    @property
    def seeds_per_arm(self) -> list[int]:
        """The number of seeds of each arm of each model size, ascending."""
        arms = collections.Counter((run.arm, run.parameters) for run in self.material.runs)
        return sorted(arms.values())

    @property
    def plots(self) -> dict[str, Plot]:
        """The plots by unique name: of equal names the later ones have a number appended."""
        named: dict[str, list[Plot]] = {}
        for section in self.sections:
            for plot in section.plots:
                named.setdefault(plot.name, []).append(plot)
        return {
            f"{name}_{number}" if len(same) > 1 else name: plot
            for name, same in named.items()
            for number, plot in enumerate(same, start=1)
        }

    @property
    def printed(self) -> list[Table]:
        """The tables for the terminal."""
        shown = (section.tables for section in self.sections if not section.details)
        return [*itertools.chain.from_iterable(shown)]


def compose(
    material: Material, charge_teacher_training: bool = False, reference: str = seeds.REFERENCE
) -> Report:
    """Makes the whole report; the arms are charged for training their teachers on request, and over
    seeds compared with `reference`. InputError if that is neither the default nor an arm."""
    if charge_teacher_training:
        charged = tuple(map(charged_for_teacher, material.runs))
        material = dataclasses.replace(material, runs=charged)
    runs = material.runs
    arms = sorted({run.arm for run in runs})
    if reference != seeds.REFERENCE and reference not in arms:
        raise InputError(
            f"reference is {reference!r}{nearest(reference, arms)}, and the arms are "
            f"{', '.join(arms)}: name one of them."
        )
    groups = comparable_groups(runs)
    compared = [group for group in groups if len(group) > 1]
    alone = [run for group in groups if len(group) == 1 for run in group]
    foreground = [run for group in compared for run in group] or alone
    looks = {run.label: plots.IN_THE_BACKGROUND for run in alone} | _looks(foreground)
    matches = [[m for axis in AXES if (m := matched(group, axis))] for group in compared]
    over_seeds = [
        seeds.over_seeds(group, reference) if seeds.arms_repeat(group) else () for group in compared
    ]
    sections: list[Section] = []
    if runs:
        sections.append(Section("Results", "results", tables=[tables.final_table(runs)]))
    ladders = ladder.ladders_of(runs, reference)
    sections += _ladder_sections(ladders, looks)
    for group, found, estimates in zip(compared, matches, over_seeds, strict=True):
        size = group[0].parameters
        of_size = f" ({size:,} parameters)" if len(compared) > 1 and size else ""
        if estimates:
            sections += _seed_sections(group, estimates, looks, of_size, reference)
        else:
            each = {run.label: [run] for run in group}
            at_equal = {match.axis: tables.matched_table(match) for match in found}
            sections += _curve_sections(each, alone, looks, at_equal, of_size)
    if alone and not compared:
        sections += _curve_sections({run.label: [run] for run in alone}, [], looks, {}, "")
    if runs:
        sections += _run_sections(runs, charge_teacher_training)
    sections += [
        Section(
            f"Paired comparison: {pair.name}",
            tables=[paired_comparison.difference_table(pair.differences, pair.title)],
            plots=[paired.comparison_plot(pair)],
        )
        for pair in material.comparisons
    ]
    if material.scores or material.selections:
        sections.append(_score_section(material.scores, material.selections))
    sections += _audit_sections(material.selections)
    return Report(
        material=material,
        sections=sections,
        looks=looks,
        numbers={
            **_numbers(material, [*itertools.chain(*matches)]),
            "over_seeds": [dataclasses.asdict(arm) for arm in itertools.chain(*over_seeds)],
            "ladders": [fitted.to_json() for _, fitted in ladders if fitted],
        },
    )


def _looks(runs: Sequence[TrainRun]) -> dict[str, Style]:
    """Styles by label and by arm; all seeds of an arm have its style."""
    by_arm = plots.styles({run.arm: run.arm for run in runs})
    if seeds.arms_repeat(runs):
        return {**{run.label: by_arm[run.arm] for run in runs}, **by_arm}
    return {**by_arm, **plots.styles({run.label: run.arm for run in runs})}


def _ladder_sections(
    ladders: Sequence[tuple[Sequence[int], Ladder | None]], looks: Mapping[str, Style]
) -> Iterator[Section]:
    """The laws over sizes of each cache, or why there are none."""
    for sizes, fitted in ladders:
        if fitted is not None:
            facts = {"sizes": len(sizes), "least": fitted.least(), "flops": fitted.spent}
            own = {**plots.styles({arm: arm for arm in fitted.arms}), **looks}
            table, plot = ladder.ladder_table(fitted), plots.ladder_plot(fitted, own)
            yield Section("Over sizes", "ladder", facts, [table], [plot])
        elif len(sizes) > 1:
            yield Section("Over sizes", "ladder", {"sizes": len(sizes)})


def _seed_sections(
    group: Sequence[TrainRun],
    estimates: Sequence[seeds.ArmOverSeeds],
    looks: Mapping[str, Style],
    of_size: str,
    reference: str,
) -> Iterator[Section]:
    """Arms over their seeds: at the end, then against each cost."""
    at_end = seeds.final_seeds_table(estimates, reference, of_size)
    yield Section(f"Over seeds{of_size}", tables=[at_end])
    at_equal = {
        axis: seeds.equal_cost_table(estimates, axis, value, reference, of_size)
        for axis, value in seeds.common_values(group).items()
    }
    arms = {arm: [*runs.values()] for arm, runs in seeds.by_arm(group).items()}
    yield from _curve_sections(arms, [], looks, at_equal, of_size)


def _curve_sections(
    arms: Mapping[str, Sequence[TrainRun]],
    others: Sequence[TrainRun],
    looks: Mapping[str, Style],
    at_equal: Mapping[Axis, Table],
    of_size: str,
) -> Iterator[Section]:
    """Evaluation curves against each cost, the arms at equal cost, and the training loss."""
    group = [run for runs in arms.values() for run in runs]
    for axis in AXES if any(len(run.evaluations) for run in group) else ():
        yield Section(
            f"Against {axis.title}{of_size}",
            axis.name,
            {"charged": any(run.costs[FLOPS_PARTS[-1]] for run in group)},
            [at_equal[axis]] if axis in at_equal else [],
            [plots.evaluation_plot(arms, others, looks, axis, metric) for metric in plots.METRICS],
        )
    if len(group) == len(arms) and any(len(run.training) for run in group):
        yield Section(f"Training loss{of_size}", plots=[plots.training_plot(group, looks)])


def _run_sections(runs: Sequence[TrainRun], charged: bool) -> Iterator[Section]:
    """What the runs cost, how stable they were, and their results by subset."""
    by_part = tables.cost_tables(runs, charged)
    yield Section("What the runs cost", "costs", {"charged": charged}, by_part, details=True)
    spikes = stability.spikes_table(runs)
    steadiness = [table for table in (stability.switch_table(runs), spikes) if table]
    if steadiness:
        yield Section("Stability", "stability", {"spikes": spikes}, steadiness, details=True)
    if by_subset := tables.subset_table(runs):
        yield Section("Results by subset", tables=[by_subset], details=True)


def _score_section(scores: Sequence[ScoreFolder], selections: Sequence[SelectionFolder]) -> Section:
    """Each score folder, with the selections made by its scores or at random from the same rows."""
    images, placed = [], []
    for scored in scores:
        own = [selected for selected in selections if _belongs(selected, scored)]
        placed += own
        by_score: dict[str, list[SelectionFolder]] = {}
        for selected in own:
            if score := selected.selection.manifest["score"]:
                by_score.setdefault(str(score), []).append(selected)
        at_random = [one for one in own if not one.selection.manifest["score"]]
        # One plot for each score that selections were made by, or else for the default one.
        for same in by_score.values() or [[]]:
            if same:
                score = ScoreConfig(**same[0].selection.manifest["score"])
                scored = dataclasses.replace(scored, score=score)
            images.append(plots.score_plot(scored, [*same, *at_random]))
    by_one = [s for s in selections if "later_scores" not in s.selection.manifest["how"]]
    missing = [one.name for one in by_one if one not in placed]
    shown = [tables.scores_table(scores)] if scores else []
    shown += [tables.selections_table(selections)] if selections else []
    return Section("Scores of rows", "scores", {"missing": missing}, shown, images)


def _audit_sections(selections: Sequence[SelectionFolder]) -> Iterator[Section]:
    """What each selection with an audit took."""
    for selected in selections:
        if selected.audit is not None:
            yield Section(
                f"Audit of {selected.name}",
                tables=selection_audit.audit_tables(selected.name, selected.audit),
                plots=selection_audit.audit_plots(selected.name, selected.audit),
                excerpts=selection_audit.audit_excerpts(selected.audit),
                details=True,
            )


def _belongs(selected: SelectionFolder, scored: ScoreFolder) -> bool:
    """Whether a selection was made from these scores or, at random, from the same rows."""
    chosen, rows = selected.selection.manifest, scored.rows
    if "later_scores" in chosen["how"]:
        return False  # the differences of two folders' scores are on no plot
    if chosen["scores_digest"] is not None:
        return chosen["scores_digest"] == rows.digest
    is_within = selected.selection.row_ids.max(initial=-1) < rows.rows
    return is_within and all(chosen[n] == rows.manifest[n] for n in ("cache_digest", "split"))


def _numbers(material: Material, matches: Sequence[Matched]) -> dict[str, Any]:
    return {
        "runs": [_run_numbers(run) for run in material.runs],
        "matched": [
            {
                "axis": match.axis.name,
                "value": match.value,
                "arms": [
                    {"label": label, **_reading_numbers(reading)}
                    for label, reading in match.readings.iterrows()
                ],
            }
            for match in matches
        ],
        "scores": [
            {"path": str(scored.origin.path), "rows": scored.rows.rows}
            for scored in material.scores
        ],
        "selections": [
            {"path": str(one.origin.path), "rows": len(one.selection.row_ids), "cut": one.cut}
            for one in material.selections
        ],
    }


def _reading_numbers(reading: pd.Series) -> dict[str, Any]:
    if math.isnan(reading["step"]):
        return {}
    columns = ["step", *QUALITY, "interpolated", "train_flops", "seconds"]
    return {
        **reading[columns].to_dict(),
        "interpolated": bool(reading["interpolated"]),
        "costs": reading[[*PARTS]].to_dict(),
    }


def _run_numbers(run: TrainRun) -> dict[str, Any]:
    teacher = run.teacher
    results = [*QUALITY, *SUMS]
    return {
        "label": run.label,
        "arm": run.arm,
        "path": str(run.origin.path),
        "finished": run.finished,
        "seed": run.seed,
        "parameters": run.parameters,
        "switch_step": run.switch_step,
        "switch_decision": run.facts.get("watched"),
        "steps": run.last_step,
        "skipped_updates": run.skipped_updates,
        **(dict.fromkeys(results) if run.final is None else run.final[results].to_dict()),
        "costs": run.costs[[*PARTS]].to_dict(),
        "wall_time": {name: tables.or_none(value) for name, value in run.wall_time.items()},
        "teacher_training": teacher
        and {
            "teacher": f"{teacher.name} at step {teacher.step}",
            **teacher.costs[["train_flops", "seconds"]].to_dict(),
        },
    }
