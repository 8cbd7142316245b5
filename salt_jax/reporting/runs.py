"""Reads run folders: training runs with their metrics, scores, and selections.

The kind of a folder is recognised by its run.json or its manifest.
"""

import dataclasses
import functools
import math
import os
import pathlib
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from salt_jax.data.row_scores import AUDIT_FILE, RowScores, Selection
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError, visible
from salt_jax.evaluation.paired_comparison import Difference, differences_from_json
from salt_jax.storage.buckets import is_remote
from salt_jax.storage.json_files import parse_json, read_json_object, require_shape
from salt_jax.storage.local_copies import local_run
from salt_jax.storage.manifests import MANIFEST_FILE
from salt_jax.storage.run_folder import CONFIG_FILE, METRICS_FILE, RUN_FILE, SUMMARY_FILE

CURVE_SPLIT = "validation"
_WHOLE = "give the folder of a whole run"

# Columns of the data frames of metrics: quality (nats per token and a fraction), cost counters
# since step 0, and their parts, as in `training/ledger.py`. The cost of training the teacher is 0
# unless it is charged (`comparison.charged_for_teacher`).
QUALITY = ("log_perplexity", "next_token_accuracy")
SUMS = ("train_flops", "tokens", "seconds")
FLOPS_PARTS = ("student_flops", "teacher_flops", "scoring_flops", "teacher_training_flops")
SECONDS_PARTS = ("stage1_seconds", "stage2_seconds", "scoring_seconds", "teacher_training_seconds")
PARTS = (
    *(*FLOPS_PARTS, "evaluation_flops", "stage1_tokens", "stage2_tokens", "scoring_tokens"),
    *(*SECONDS_PARTS, "evaluation_seconds", "compile_seconds"),
)
WALL_TIME = (
    *("steps_seconds", "start_seconds", "compile_seconds", "restore_seconds", "save_seconds"),
    *("evaluation_seconds", "rows_seconds", "lost_steps_seconds", "wall_seconds"),
    *("goodput", "starts", "chip_hours", "cost", "seconds_left"),
)
_EVALUATED = ("step", *QUALITY, *SUMS)
EVALUATION = (*_EVALUATED, *PARTS)
_TRAINED = ("step", "stage", "loss", "log_perplexity", "skipped_updates", *SUMS)
TRAINING = (*_TRAINED, "grad_norm", "update_norm", *PARTS)

# The types of the fields that are read from summary.json if present.
_FACTS = {
    **{"arm": str, "seed": (None, int), "parameters": (None, int), "distill_steps": int},
    **{"skipped_updates": int, "cache_digest": (None, str), "teacher": (None, {})},
    "watched": {"mean": float, "n_kd": (None, int)},
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a folder was made, by its run.json and config.gin."""

    path: pathlib.Path
    verb: str
    command_line: str
    versions: Mapping[str, str]
    git_commit: str | None
    started: str
    config: str

    @property
    def name(self) -> str:
        """The folder's name, printable."""
        return visible(self.path.name)


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherFacts:
    """A run's teacher: its folder on disk, that folder's name or its run's label, the checkpoint's
    step and digest, and the cost of its training, SUMS and PARTS, NaN if unknown."""

    path: pathlib.Path | None
    name: str
    step: int
    digest: str
    costs: pd.Series

    @property
    def cost_is_known(self) -> bool:
        """Whether the cost is known; not so for imported models."""
        return bool(np.isfinite(self.costs[["train_flops", "seconds"]]).all())


@dataclasses.dataclass(frozen=True, eq=False)
class TrainRun:
    """One training run, finished or not.

    Attributes:
      origin: How it was made.
      label: Its name in the report, unique among the report's runs.
      facts: summary.json; empty until the run has finished.
      evaluations: Columns EVALUATION, a row for each evaluation on CURVE_SPLIT, steps ascending.
      training: Columns TRAINING, a row for each line of training metrics, steps ascending.
      final: The summary's evaluation, or else the last one so far, if any.
      by_subset: Its log-perplexity, next-token accuracy and tokens by subset.
      teacher: None without one, or until the run has finished.
      wall_time: WALL_TIME of all its starts (`training/wall_time.py`), NaN where unknown.
      skipped_lines: Truncated lines of metrics.jsonl, which are skipped.
    """

    origin: Origin
    label: str
    facts: Mapping[str, Any]
    evaluations: pd.DataFrame
    training: pd.DataFrame
    final: pd.Series | None
    by_subset: pd.DataFrame
    teacher: TeacherFacts | None
    wall_time: Mapping[str, float]
    skipped_lines: int

    @property
    def finished(self) -> bool:
        return bool(self.facts)

    @property
    def arm(self) -> str:
        """The arm's name; the folder's until the run has written its summary."""
        return self.facts.get("arm", self.origin.name)

    @property
    def parameters(self) -> int | None:
        return self.facts.get("parameters")

    @property
    def seed(self) -> int | None:
        return self.facts.get("seed")

    @functools.cached_property
    def points(self) -> pd.DataFrame:
        """All measurements, of training and of evaluations, steps ascending."""
        return pd.concat([self.training, self.evaluations]).sort_values("step", kind="stable")

    @property
    def last_step(self) -> int:
        return int(max(self.facts.get("steps", 0), self.points["step"].iloc[-1]))

    @property
    def switch_step(self) -> int | None:
        """Steps completed at the switch from stage 1 to stage 2; None for a run with one stage."""
        if "distill_steps" in self.facts:
            step = self.facts["distill_steps"]
            return step if 0 < step < self.last_step else None
        stage = self.training["stage"]
        before = self.training["step"][(stage == 1) & (stage.shift(-1) == 2)]
        return None if before.empty else int(before.iloc[0])

    @property
    def costs(self) -> pd.Series:
        """SUMS and PARTS of the run's cost at its end, or so far."""
        at_end = self.final if self.finished and self.final is not None else self.points.iloc[-1]
        return at_end[[*SUMS, *PARTS]]

    @property
    def skipped_updates(self) -> int:
        so_far = int(self.training["skipped_updates"].tail(1).sum())
        return self.facts.get("skipped_updates", so_far)


@dataclasses.dataclass(frozen=True, eq=False)
class _Folder:
    origin: Origin

    @property
    def name(self) -> str:
        return self.origin.name


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreFolder(_Folder):
    """A folder of `salt score`, and the column that is shown."""

    rows: RowScores
    score: ScoreConfig

    @functools.cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """float32[N], a score for each row of the split; −∞ or NaN for none."""
        how = self.score
        return self.rows.scores(how.column, how.learnable_column, how.min_learnable_fraction)[:]


@dataclasses.dataclass(frozen=True, eq=False)
class SelectionFolder(_Folder):
    """A folder of `salt select`, with the selection's audit if there is one."""

    selection: Selection
    audit: Mapping[str, Any] | None

    @property
    def cut(self) -> float | None:
        """The lowest score selected."""
        return self.selection.manifest["cut"]

    @property
    def stratified(self) -> bool:
        """Whether each subset has a cut of its own."""
        how = self.selection.manifest["how"]
        return bool(how.get("stratified") or how.get("most_of_subset"))


@dataclasses.dataclass(frozen=True, eq=False)
class ComparisonFolder(_Folder):
    """A folder of `salt evaluate --compare`: which models, and differences by kind and group."""

    title: str
    differences: Mapping[str, Mapping[str, Difference]]


@dataclasses.dataclass(frozen=True)
class Material:
    """Everything that a report is made from."""

    runs: tuple[TrainRun, ...]
    scores: tuple[ScoreFolder, ...]
    selections: tuple[SelectionFolder, ...]
    comparisons: tuple[ComparisonFolder, ...] = ()


def read_folders(paths: Sequence[str | pathlib.Path]) -> Material:
    """Reads folders of `salt train`, `score`, `select` and `evaluate --compare`, in any order.

    Raises:
      InputError: No folder, the same folder twice, or one that is none of these.
    """
    folders = [local_run(path) for path in paths]
    if not folders:
        raise InputError("No run was given: `salt report` needs at least one folder, RUN….")
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise InputError(f"The folder {folder} was given twice: name each run once.")
    read = [read_folder(folder) for folder in folders]
    return Material(
        runs=_labelled([found for found in read if isinstance(found, TrainRun)]),
        scores=tuple(found for found in read if isinstance(found, ScoreFolder)),
        selections=tuple(found for found in read if isinstance(found, SelectionFolder)),
        comparisons=tuple(found for found in read if isinstance(found, ComparisonFolder)),
    )


def read_folder(
    path: pathlib.Path,
) -> TrainRun | ScoreFolder | SelectionFolder | ComparisonFolder:
    """Reads one folder.

    Raises:
      InputError: No such folder, not one of these verbs', or malformed files.
    """
    if not path.is_dir():
        raise InputError(f"There is no folder {path}: name the output folder of a run.")
    origin = _origin(path)
    manifest = path / MANIFEST_FILE
    kind = read_json_object(manifest, _WHOLE).get("kind") if manifest.exists() else None
    if origin.verb == "train":
        return _train_run(origin)
    if origin.verb == "score" or kind == "row_scores":
        scores = RowScores.open(path)
        return ScoreFolder(origin, scores, ScoreConfig(scores.manifest["k"][0]))
    if origin.verb == "select" or kind == "selection":
        audit = path / AUDIT_FILE
        found = read_json_object(audit, _WHOLE) if audit.exists() else None
        return SelectionFolder(origin, Selection.open(path), found)
    if origin.verb == "evaluate" and (path / SUMMARY_FILE).exists():
        comparison = read_json_object(path / SUMMARY_FILE, _WHOLE).get("comparison")
        if isinstance(comparison, dict):
            return _comparison(origin, comparison)
    what = f"a run of `salt {origin.verb}`" if origin.verb else "no run"
    below = sorted(found.parent.name for found in path.glob(f"*/{RUN_FILE}"))
    hint = f" (it has folders of runs in it, give those: {', '.join(below[:8])})" if below else ""
    raise InputError(
        f"The folder {path} holds {what}: `salt report` takes output folders of `salt train`, "
        f"`salt score`, `salt select` and `salt evaluate --compare`{hint}."
    )


def _labelled(runs: Sequence[TrainRun]) -> tuple[TrainRun, ...]:
    """Gives each run a unique label: its arm or, if arms repeat, the end of its path, from the
    arm's folder on if there is one."""
    labels = [run.arm for run in runs]
    folders = [run.origin.path.resolve() for run in runs]
    shared = os.path.commonpath([str(path.parent) for path in folders] or ["/"])
    places = [folder.relative_to(shared).parts for folder in folders]
    arms = [arm in at and at[::-1].index(arm) + 1 for arm, at in zip(labels, places, strict=True)]
    for depth in range(1, max(map(len, places), default=0) + 1):
        labels = [
            visible("/".join(place[-max(depth, arm) :])) if labels.count(label) > 1 else label
            for label, place, arm in zip(labels, places, arms, strict=True)
        ]
    names, labelled = dict(zip(folders, labels, strict=True)), []
    for run, label in zip(runs, labels, strict=True):
        taught = run.teacher
        if taught is not None and taught.path in names:
            taught = dataclasses.replace(taught, name=names[taught.path])
        labelled.append(dataclasses.replace(run, label=label, teacher=taught))
    return tuple(labelled)


def _train_run(origin: Origin) -> TrainRun:
    summary, metrics = origin.path / SUMMARY_FILE, origin.path / METRICS_FILE
    facts = read_json_object(summary, _WHOLE) if summary.exists() else {}
    require_shape(summary, facts, {k: v for k, v in _FACTS.items() if k in facts}, _WHOLE)
    if not metrics.exists():
        raise InputError(f"The run {origin.path} has no {METRICS_FILE}: it has not begun training.")
    # By step: of two lines the later one, written by a resumed run, counts.
    evaluations: dict[float, dict[str, float]] = {}
    training: dict[float, dict[str, float]] = {}
    by_subset: dict[float, pd.DataFrame] = {}
    skipped_lines, wall_time = 0, facts.get("wall_time")
    for where, record in _lines(metrics):
        if record is None:
            skipped_lines += 1
            continue
        if not facts:
            wall_time = record.get("wall_time", wall_time)
        if record.get("kind") == "train":
            row = _row(record, TRAINING, _TRAINED, where)
            training[row["step"]] = row
        elif record.get("kind") == "eval" and record.get("split") == CURVE_SPLIT:
            row = _row(record, EVALUATION, _EVALUATED, where)
            evaluations[row["step"]] = row
            by_subset[row["step"]] = _subsets(record, where)
    if not evaluations and not training:
        raise InputError(f"The run {origin.path} has no measurement yet: leave it out, or wait.")
    end = max(evaluations, default=math.inf)
    final = evaluations.get(end)
    if facts:
        ended = {**facts, "step": facts.get("steps")}
        final = _row(ended, EVALUATION, _EVALUATED, str(summary))
        by_subset[end] = _subsets(facts, str(summary))
    return TrainRun(
        origin=origin,
        label=facts.get("arm", origin.name),
        facts=facts,
        evaluations=_frame(evaluations, EVALUATION),
        training=_frame(training, TRAINING),
        final=None if final is None else pd.Series(final),
        by_subset=by_subset.get(end, _subsets({}, "")),
        teacher=_teacher(facts),
        wall_time=_row(wall_time if isinstance(wall_time, dict) else {}, WALL_TIME, (), ""),
        skipped_lines=skipped_lines,
    )


def _comparison(origin: Origin, comparison: Mapping[str, Any]) -> ComparisonFolder:
    try:
        found = differences_from_json(comparison)
    except ValueError as error:
        raise InputError(
            f"The comparison in {origin.path / SUMMARY_FILE} is malformed ({error}): evaluate "
            "again."
        ) from error
    return ComparisonFolder(origin, str(comparison.get("title", origin.name)), found)


def _frame(rows: Mapping[float, Mapping[str, float]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame([rows[step] for step in sorted(rows)], columns=[*columns], dtype=float)


def _teacher(facts: Mapping[str, Any]) -> TeacherFacts | None:
    if (teacher := facts.get("teacher")) is None:
        return None
    path, cost = str(teacher.get("path", "")), teacher.get("training_cost")
    return TeacherFacts(
        path=pathlib.Path(path).resolve() if path and not is_remote(path) else None,
        name=pathlib.Path(path).name,
        step=teacher.get("step"),
        digest=str(teacher.get("digest")),
        costs=pd.Series(_row(cost if isinstance(cost, dict) else {}, (*SUMS, *PARTS), (), "")),
    )


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The place and the object of each line; None for a truncated line."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            yield f"{path}, line {number}", record if isinstance(record, dict) else None


def _row(
    record: Mapping[str, Any], names: Sequence[str], required: Collection[str], where: str
) -> dict[str, float]:
    """The named numbers of a record; NaN for null, which stands for a number that was not finite,
    and for a missing one that is not required."""
    row = {name: 0.0 if name.startswith("teacher_training") else math.nan for name in names}
    for name in names:
        value = record.get(name)
        # An integer may be too large for a float.
        if type(value) is float or (type(value) is int and value.bit_length() < 1024):
            row[name] = float(value)
        elif name in required and name not in record:
            raise InputError(f"{where}: {name} is missing; was another version's run given?")
        elif name in required and value is not None:
            raise InputError(f"{where}: {name} is {value!r}, not a number.")
    if "step" in row and not 0 <= row["step"] < math.inf:
        raise InputError(f"{where}: step is {record['step']!r}, not a number of steps.")
    if not math.isfinite(row.get("log_perplexity", 0.0)) and "next_token_accuracy" in row:
        row["next_token_accuracy"] = math.nan  # meaningless for a model that gives NaN
    return row


def _subsets(record: Mapping[str, Any], where: str) -> pd.DataFrame:
    """An evaluation's results by subset."""
    subsets, columns = record.get("by_subset") or {}, (*QUALITY, "tokens")
    if not isinstance(subsets, dict) or not all(isinstance(x, dict) for x in subsets.values()):
        raise InputError(f"{where}: by_subset must be an object of objects: {_WHOLE}.")
    rows = [_row(part, columns, columns, where) for part in subsets.values()]
    return pd.DataFrame(rows, index=[*subsets], columns=[*columns], dtype=float)


def _origin(path: pathlib.Path) -> Origin:
    run_file, config = path / RUN_FILE, path / CONFIG_FILE
    content = read_json_object(run_file, _WHOLE) if run_file.exists() else {}
    typed, versions = content.get("command_line") or "", content.get("versions") or {}
    shape = {"versions": {str: str}, "command_line": str if isinstance(typed, str) else [str]}
    require_shape(run_file, {"versions": versions, "command_line": typed}, shape, _WHOLE)
    return Origin(
        path=path,
        verb=str(content.get("verb", "")),
        command_line=typed if isinstance(typed, str) else shlex.join(typed),
        versions=versions,
        git_commit=content.get("git_commit"),
        started=str(content.get("started", "")),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
    )
