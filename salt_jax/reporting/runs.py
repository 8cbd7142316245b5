"""What the folders of a report hold: training runs with their evaluations, scores and selections.

A folder's kind is recognised by its run.json or manifest.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from salt_jax.data.row_scores import AUDIT_FILE, RowScores, Selection
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.reporting.costs import Costs, TeacherTraining
from salt_jax.storage.json_files import parse_json, read_json_object, require_shape
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.manifests import MANIFEST_FILE
from salt_jax.storage.run_folder import CONFIG_FILE, METRICS_FILE, RUN_FILE, SUMMARY_FILE

CURVE_SPLIT = "validation"
_WHOLE = "give the folder of a whole run"


@dataclasses.dataclass(frozen=True)
class SubsetResult:
    """One subset's part of an evaluation: nats per token, a fraction, and tokens evaluated."""

    log_perplexity: float
    next_token_accuracy: float
    tokens: float


@dataclasses.dataclass(frozen=True)
class EvaluationPoint:
    """Held-out results after `step` steps, and what training had cost by then.

    Attributes:
      step: Steps completed.
      log_perplexity: Nats per token.
      next_token_accuracy: A fraction of 1.
      train_flops, tokens, seconds: Cumulative, of training, from step 0.
      costs: What they consist of, and what is not in them.
      by_subset: The same by subset, empty where it was not measured.
    """

    step: int
    log_perplexity: float
    next_token_accuracy: float
    train_flops: float
    tokens: float
    seconds: float
    by_subset: Mapping[str, SubsetResult] = dataclasses.field(default_factory=dict)
    costs: Costs = Costs()  # noqa: RUF009 (frozen)


@dataclasses.dataclass(frozen=True)
class TrainingPoint:
    """One line of training metrics: losses in nats per token, costs cumulative from step 0.

    The norms, of all gradients and of the optimizer's update, are NaN where they are not known.
    """

    step: int
    stage: int
    loss: float
    log_perplexity: float
    train_flops: float
    tokens: float
    seconds: float
    skipped_updates: int
    costs: Costs = Costs()  # noqa: RUF009 (frozen)
    grad_norm: float = math.nan
    update_norm: float = math.nan


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a folder was made, as its run.json and config.gin say it."""

    path: pathlib.Path
    verb: str
    command_line: str
    versions: Mapping[str, str]
    git_commit: str | None
    started: str
    config: str


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """One training run, finished or not.

    Attributes:
      origin: How it was made.
      label: What the report calls it; unique among the runs of one report.
      facts: summary.json; empty while the run has not finished.
      evaluations, training: Ascending by step, each step once.
      unreadable_lines: Lines of metrics.jsonl that were cut short and left out.
    """

    origin: Origin
    label: str
    facts: Mapping[str, Any]
    evaluations: tuple[EvaluationPoint, ...]
    training: tuple[TrainingPoint, ...]
    unreadable_lines: int = 0

    def __post_init__(self) -> None:
        for points in (self.evaluations, self.training):
            steps = [point.step for point in points]
            if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
                raise ValueError(f"{self.origin.path}: steps must ascend, got {steps}.")

    @property
    def finished(self) -> bool:
        return bool(self.facts)

    @property
    def arm(self) -> str:
        """The method's name, or the folder's until the run has written its summary."""
        return str(self.facts.get("arm", self.origin.path.name))

    @property
    def parameters(self) -> int | None:
        return self.facts.get("parameters")

    @property
    def seed(self) -> int | None:
        return self.facts.get("seed")

    @property
    def last_step(self) -> int:
        evaluated = self.evaluations[-1].step if self.evaluations else 0
        trained = self.training[-1].step if self.training else 0
        return max(int(self.facts.get("steps", 0)), evaluated, trained)

    @property
    def switch_step(self) -> int | None:
        """Steps completed at the switch from stage 1 to stage 2; None for a run with one stage."""
        if self.finished and "distill_steps" in self.facts:
            step = int(self.facts["distill_steps"])
            return step if 0 < step < self.last_step else None
        for before, after in itertools.pairwise(self.training):
            if (before.stage, after.stage) == (1, 2):
                return before.step
        return None

    @property
    def final(self) -> EvaluationPoint | None:
        """The result at the end: of the summary, else of the last evaluation so far."""
        if self.finished:
            where = str(self.origin.path / SUMMARY_FILE)
            return _evaluation({**self.facts, "step": self.facts.get("steps")}, where)
        return self.evaluations[-1] if self.evaluations else None

    @property
    def costs(self) -> Costs:
        """What the run has cost, at its end or so far."""
        if self.finished:
            return Costs.of(self.facts)
        measured = [points[-1] for points in (self.training, self.evaluations) if points]
        return max(measured, key=lambda point: point.step).costs if measured else Costs()

    @property
    def teacher_training(self) -> TeacherTraining | None:
        """What its teacher had cost; None without a teacher, or before the run has finished."""
        return TeacherTraining.of(self.facts)

    @property
    def skipped_updates(self) -> int:
        last = self.training[-1].skipped_updates if self.training else 0
        return int(self.facts.get("skipped_updates", last))


@dataclasses.dataclass(frozen=True)
class ScoreFolder:
    """A folder of `salt score`, and which of its columns is looked at as the score."""

    origin: Origin
    rows: RowScores
    score: ScoreConfig

    @functools.cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """float32[N], one per row of the split; −∞ or NaN where there is none."""
        score = self.score
        return self.rows.scores(score.column, score.learnable_column, score.min_learnable_fraction)[
            :
        ]

    @property
    def column(self) -> str:
        return self.score.column

    @property
    def digest(self) -> str:
        return self.rows.digest

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.rows.manifest

    def by(self, score: Mapping[str, Any]) -> "ScoreFolder":
        """The same folder by another score: a selection's."""
        return dataclasses.replace(self, score=ScoreConfig(**score))


@dataclasses.dataclass(frozen=True)
class SelectionFolder:
    """A folder of `salt select`: ids int64[m] of rows, ascending, how they were chosen, and their
    audit where the folder has one."""

    origin: Origin
    row_ids: npt.NDArray[np.int64]
    cut: float | None
    scores_digest: str | None
    manifest: Mapping[str, Any]
    audit: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.origin.path.name

    @property
    def stratified(self) -> bool:
        """Whether each subset has a cut of its own, of which `cut` is the lowest."""
        return bool(self.manifest["how"].get("stratified"))


@dataclasses.dataclass(frozen=True)
class Material:
    """All that a report is made from."""

    runs: tuple[TrainRun, ...]
    scores: tuple[ScoreFolder, ...]
    selections: tuple[SelectionFolder, ...]


def read_folders(paths: Sequence[str | pathlib.Path]) -> Material:
    """Reads folders of `salt train`, `salt score` and `salt select`, in any order.

    Raises:
      InputError: No folder, the same folder twice, or one that holds none of these.
    """
    folders = [
        local_folder(path, lambda name: not name.startswith("checkpoints/")) for path in paths
    ]
    if not folders:
        raise InputError("No run was given: `salt report` needs at least one folder, RUN….")
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise InputError(f"The folder {folder} was given twice: name each run once.")
    read = [read_folder(folder) for folder in folders]
    return Material(
        runs=labelled([found for found in read if isinstance(found, TrainRun)]),
        scores=tuple(found for found in read if isinstance(found, ScoreFolder)),
        selections=tuple(found for found in read if isinstance(found, SelectionFolder)),
    )


def read_folder(path: pathlib.Path) -> TrainRun | ScoreFolder | SelectionFolder:
    """Reads one folder.

    Raises:
      InputError: No such folder, no run of the three verbs, or damaged files.
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
        selection = Selection.open(path)
        content = selection.manifest
        audit = path / AUDIT_FILE
        return SelectionFolder(
            origin=origin,
            row_ids=selection.row_ids,
            cut=content["cut"],
            scores_digest=content["scores_digest"],
            manifest=content,
            audit=read_json_object(audit, _WHOLE) if audit.exists() else None,
        )
    what = f"a run of `salt {origin.verb}`" if origin.verb else "no run"
    raise InputError(
        f"The folder {path} holds {what}: `salt report` takes output folders of `salt train`, "
        f"`salt score` and `salt select`{_runs_below(path)}."
    )


def labelled(runs: Sequence[TrainRun]) -> tuple[TrainRun, ...]:
    """Gives each run a label of its own: its arm or, where arms repeat, the end of its path."""
    labels = [run.arm for run in runs]
    places = [run.origin.path.resolve().parts for run in runs]
    for depth in range(1, max((len(place) for place in places), default=0) + 1):
        repeated = {label for label in labels if labels.count(label) > 1}
        if not repeated:
            break
        labels = [
            "/".join(place[-depth:]) if label in repeated else label
            for label, place in zip(labels, places, strict=True)
        ]
    return tuple(
        dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)
    )


def _train_run(origin: Origin) -> TrainRun:
    path = origin.path
    summary = path / SUMMARY_FILE
    facts = read_json_object(summary, _WHOLE) if summary.exists() else {}
    metrics = path / METRICS_FILE
    if not metrics.exists():
        raise InputError(f"The run {path} has no {METRICS_FILE}: it has not begun training.")
    evaluations: dict[int, EvaluationPoint] = {}
    training: dict[int, TrainingPoint] = {}
    unreadable_lines = 0
    for where, record in _records(metrics):
        if record is None:
            unreadable_lines += 1
        elif record.get("kind") == "train":
            training[_step(record, where)] = _training_point(record, where)
        elif record.get("kind") == "eval" and record.get("split") == CURVE_SPLIT:
            evaluations[_step(record, where)] = _evaluation(record, where)
    if not evaluations and not training:
        raise InputError(f"The run {path} has no measurement yet: leave it out, or wait.")
    run = TrainRun(
        origin=origin,
        label=str(facts.get("arm", path.name)),
        facts=facts,
        evaluations=tuple(evaluations[step] for step in sorted(evaluations)),
        training=tuple(training[step] for step in sorted(training)),
        unreadable_lines=unreadable_lines,
    )
    if run.finished:
        _ = run.final  # a damaged summary is to be named now, not while the page is made
    return run


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line's place and object; None for a line cut short by a kill."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            yield f"{path}, line {number}", record if isinstance(record, dict) else None


def _training_point(record: Mapping[str, Any], where: str) -> TrainingPoint:
    return TrainingPoint(
        step=_step(record, where),
        stage=int(_number(record, "stage", where)),
        skipped_updates=int(_number(record, "skipped_updates", where)),
        costs=Costs.of(record),
        **{
            name: _number(record, name, where)
            for name in ("loss", "log_perplexity", "train_flops", "tokens", "seconds")
        },
        **{
            name: _number(record, name, where)
            for name in ("grad_norm", "update_norm")
            if record.get(name) is not None
        },
    )


def _evaluation(record: Mapping[str, Any], where: str) -> EvaluationPoint:
    subsets = record.get("by_subset") or {}
    if not isinstance(subsets, dict) or not all(isinstance(x, dict) for x in subsets.values()):
        raise InputError(f"{where}: by_subset is no object of objects: {_WHOLE}.")
    return EvaluationPoint(
        _step(record, where),
        *_quality(record, where),
        by_subset={
            str(name): SubsetResult(*_quality(result, where), _number(result, "tokens", where))
            for name, result in subsets.items()
        },
        costs=Costs.of(record),
        **{name: _number(record, name, where) for name in ("train_flops", "tokens", "seconds")},
    )


def _quality(record: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Log-perplexity and next-token accuracy; of a model that gives NaN no prediction is right."""
    nats = _number(record, "log_perplexity", where)
    return nats, _number(record, "next_token_accuracy", where) if math.isfinite(nats) else math.nan


def _step(record: Mapping[str, Any], where: str) -> int:
    step = _number(record, "step", where)
    if not math.isfinite(step) or step < 0:
        raise InputError(f"{where}: step is {record.get('step')!r}, not a number of steps.")
    return int(step)


def _number(record: Mapping[str, Any], name: str, where: str) -> float:
    """A number; null stands for one that was not finite, which strict JSON cannot say."""
    if name not in record:
        raise InputError(f"{where}: {name} is missing; was another version's run given?")
    value = record[name]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} is {value!r}, not a number.")
    return float(value)


def _origin(path: pathlib.Path) -> Origin:
    run_file, config = path / RUN_FILE, path / CONFIG_FILE
    content = read_json_object(run_file, _WHOLE) if run_file.exists() else {}
    command_line = content.get("command_line") or ""
    versions = content.get("versions") or {}
    lists = {
        "versions": {str: str},
        "command_line": str if isinstance(command_line, str) else [str],
    }
    require_shape(run_file, {"versions": versions, "command_line": command_line}, lists, _WHOLE)
    return Origin(
        path=path,
        verb=str(content.get("verb", "")),
        command_line=command_line if isinstance(command_line, str) else shlex.join(command_line),
        versions=versions,
        git_commit=content.get("git_commit"),
        started=str(content.get("started", "")),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
    )


def _runs_below(path: pathlib.Path) -> str:
    below = sorted(found.parent.name for found in path.glob(f"*/{RUN_FILE}"))
    return f" (it has folders of runs in it, give those: {', '.join(below[:8])})" if below else ""
