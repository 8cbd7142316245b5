"""Few-shot tasks by name: lm-eval's own, those of a folder of YAML files, and salt_suite.

In: names and a model that lm-eval can ask. Out: a number for each task and metric, with its
standard error, and what the model answered.

Tasks that execute what a model writes are only generated for, and not scored, unless that is
allowed.
"""

import dataclasses
import glob
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import jinja2
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.api.task import Task

from salt_jax.errors import InputError, nearest
from salt_jax.evaluation.harness import HarnessModel
from salt_jax.evaluation.hub import do_without_the_hub_if_out_of_reach

SUITE = "salt_suite"
OWN_TASKS = pathlib.Path(__file__).parent / "tasks"

# Of metrics whose standard error has no formula; lm-eval's 100,000 take minutes.
_BOOTSTRAPS = 1000
_FEWSHOT_SEED = 1234  # lm-eval's

# What tasks, which are code of many authors, and `datasets` raise for files that are not there, not
# as expected, or refused.
_LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError),
    *(datasets.exceptions.DatasetsError, jinja2.TemplateError),
)

_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Loaded = Mapping[str, Any]  # what TaskManager.load gives: "tasks", "groups", "group_map"


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a model reached in one task, or on average in one group.

    Attributes:
      shots: Examples in a prompt; None of a group.
      documents: Documents that were asked about; None of a group.
      metrics: By metric, and by filter where it has one ("exact_match,strict-match"), the value
        and its standard error, None where it has none.
    """

    shots: int | None
    documents: int | None
    metrics: Mapping[str, tuple[float, float | None]]

    def to_json(self) -> dict[str, Any]:
        """As summary.json holds it."""
        metrics = {
            name: {"value": value, "stderr": stderr}
            for name, (value, stderr) in self.metrics.items()
        }
        return {"shots": self.shots, "documents": self.documents, "metrics": metrics}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A task and what it is made from, without loading it."""

    task: str
    kind: str
    path: str
    name: str


class Tasks:
    """All tasks there are.

    Args:
      folder: A folder of YAML files, whose tasks come before lm-eval's of the same name.
      allow_code_execution: Whether tasks may execute what a model writes.
      data: A folder of files in the place of data sets: TASK/SPLIT.jsonl, or .parquet.

    Raises:
      InputError: No such folder.
    """

    def __init__(
        self,
        folder: str | None = None,
        allow_code_execution: bool = False,
        data: str | None = None,
    ) -> None:
        if folder is not None and not pathlib.Path(folder).is_dir():
            raise InputError(
                f"task_folder is {folder}, which is no folder: name one that holds YAML files of "
                "tasks."
            )
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # Its bootstraps would fork this process, threads and devices and all.
        os.environ["DISABLE_MULTIPROC"] = "1"
        if allow_code_execution:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        else:  # it may have been set around us
            os.environ["HF_ALLOW_CODE_EVAL"] = "0"
        self._allow_code_execution = allow_code_execution
        paths = [str(OWN_TASKS), *([folder] if folder else [])]
        self._manager = lm_eval.tasks.TaskManager(include_path=paths)
        self._data = None if data is None else pathlib.Path(data)
        if self._data is not None and not self._data.is_dir():
            raise InputError(
                f"task_data is {data}, which is no folder: name one that holds TASK/SPLIT.jsonl."
            )
        self._yaml = tempfile.TemporaryDirectory(prefix="salt_jax_tasks_")

    def load(self, names: Sequence[str], shots: int | None = None) -> Loaded:
        """The tasks of these names, groups and tags, with their data sets.

        Args:
          names: Of lm-eval's, of the folder's, or salt_suite.
          shots: Examples in a prompt; each task's own number by default, and always of those that
            are meant to have none.

        Raises:
          InputError: An unknown name, a data set or a library that isn't there, files in `data`
            that are no splits, or more shots than there are examples.
        """
        for name in names:
            self._require(name)
        if self._data is not None:
            self._read_files(self._data, names)
        do_without_the_hub_if_out_of_reach()
        try:
            loaded = self._manager.load(list(dict.fromkeys(names)))
        except _LOADING_ERRORS as error:
            raise InputError(self._why(error, names)) from error
        for name, task in loaded["tasks"].items():
            _set_shots(name, task, shots)
        return loaded

    def data_sets(self, name: str) -> Iterator[DataSet]:
        """The tasks that a name stands for, and their data sets.

        Raises:
          InputError: An unknown name.
        """
        self._require(name)
        entry = self._manager.task_index[name]
        settings = entry.cfg or {}
        if entry.kind.name in ("TASK", "PY_TASK"):
            path, part = settings.get("dataset_path") or "", settings.get("dataset_name") or ""
            yield DataSet(name, settings.get("output_type") or "its own", path, part)
            return
        members = settings.get("task", ()) if settings else sorted(entry.tags)
        for member in members:
            inner = member if isinstance(member, str) else member.get("task")
            if isinstance(inner, str) and inner in self._manager.task_index:
                yield from self.data_sets(inner)

    def _require(self, name: str) -> None:
        if name not in self._manager.task_index:
            near = nearest(name, self._manager.all_tasks)
            raise InputError(
                f"There is no task {name or 'without a name'}{near}: name tasks or groups of "
                "lm-eval, of --task_folder, or salt_suite."
            )

    def _read_files(self, data: pathlib.Path, names: Sequence[str]) -> None:
        """Makes tasks that are asked for read files in the place of their data sets."""
        asked = {*names, *(one.task for name in names for one in self.data_sets(name))}
        folders = [data / name for name in sorted(asked) if (data / name).is_dir()]
        if not folders:
            raise InputError(
                f"task_data is {data}, which has no folder for any of the tasks "
                f"{', '.join(sorted(asked))}: name its folders after tasks."
            )
        for name, settings in _data_files(folders).items():
            entry = self._manager.task_index[name]
            if entry.kind.name != "TASK":
                raise InputError(
                    f"{data / name} of --task_data has the name of a group, or of a task in "
                    "Python: name each folder after one of the tasks that --list_tasks=True shows."
                )
            path = pathlib.Path(self._yaml.name) / f"{name}.yaml"
            if entry.yaml_path == path:
                continue  # of an earlier call
            include = str(pathlib.Path(entry.yaml_path).absolute())
            path.write_text(json.dumps({"include": include, **settings}), encoding="utf-8")
            cfg = {**(entry.cfg or {}), **settings}
            self._manager.task_index[name] = dataclasses.replace(entry, yaml_path=path, cfg=cfg)

    def _why(self, error: Exception, names: Sequence[str]) -> str:
        """A sentence for what kept tasks from being loaded: of the one that was loading."""
        if isinstance(error, ModuleNotFoundError):
            library = str(error.name).partition(".")[0]
            return (
                f"Among the tasks {', '.join(names)} one needs {error.name}, which is not there: "
                f"pip install {library}, or a version of it that has that, or leave the task out."
            )
        message = str(error).strip().partition("\n")[0].rstrip(".")
        task = _task_in(error)
        if task is None:
            hint = "correct its YAML file" + (", or its splits in --task_data" * bool(self._data))
            for data_set in (found for name in names for found in self.data_sets(name)):
                entry = self._manager.task_index[data_set.task]
                if (entry.cfg or {}).get("unsafe_code") and not self._allow_code_execution:
                    hint = (
                        f"{data_set.task} executes code already when it is loaded: leave it out "
                        "(salt_mbpp only generates), or set --allow_code_execution=True"
                    )
            return f"One of the tasks {', '.join(names)} cannot be loaded ({message}): {hint}."
        settings = task.config.dataset_kwargs or {}
        cannot = f"The data set of the task {task.config.task} cannot be read ({message})"
        if "data_files" in settings:
            return (
                f"{cannot}: correct the files of --task_data, or dataset_kwargs.data_files in the "
                "task's YAML file."
            )
        named = [repr(name) for name in (task.DATASET_PATH, task.DATASET_NAME) if name]
        named += [f"{name}={value!r}" for name, value in settings.items()]
        return (
            f"{cannot}: where there is a network, run datasets.load_dataset({', '.join(named)}), "
            "and copy the folder HF_DATASETS_CACHE here; or set --task_data=FOLDER and put its "
            f"splits there, as {task.config.task}/SPLIT.jsonl."
        )

    def evaluate(
        self,
        model: HarnessModel,
        loaded: Loaded,
        limit: int | None = None,
    ) -> tuple[dict[str, TaskResult], dict[str, list[dict[str, Any]]]]:
        """Asks the model.

        Args:
          model: Of the harness.
          loaded: Tasks that it has not been asked yet.
          limit: Documents of each task, the first ones; all by default.

        Returns:
          The results by task and group, and by task what was asked and answered.
        """
        unscored = {
            name: task
            for name, task in loaded["tasks"].items()
            if getattr(task, "UNSAFE_CODE", False) and not self._allow_code_execution
        }
        results: dict[str, TaskResult] = {}
        samples: dict[str, list[dict[str, Any]]] = {}
        for name, task in unscored.items():
            samples[name] = _generate_only(model, task, limit)
            results[name] = TaskResult(task.get_config("num_fewshot"), len(samples[name]), {})
        scored = {name: task for name, task in loaded["tasks"].items() if name not in unscored}
        if scored:
            found: Any = lm_eval.evaluator.evaluate(
                model,
                {"tasks": scored, "groups": _scored_groups(loaded, unscored)},
                limit=limit,
                bootstrap_iters=_BOOTSTRAPS,
                confirm_run_unsafe_code=self._allow_code_execution,
            )
            results |= {name: _result(found, name) for name in found["results"]}
            samples |= found["samples"]
        return results, samples


def _scored_groups(loaded: Loaded, unscored: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of which every task is scored, so that they have an average."""
    members: Mapping[str, Sequence[str]] = loaded["group_map"]

    def is_scored(name: str) -> bool:
        return name not in unscored and all(is_scored(one) for one in members.get(name, ()))

    return {name: group for name, group in loaded["groups"].items() if is_scored(name)}


def _data_files(folders: Sequence[pathlib.Path]) -> dict[str, dict[str, Any]]:
    """By task the settings that make it read the files in its folder."""
    found = {}
    for task in folders:
        files = {path.stem: path for path in sorted(task.iterdir())}
        kinds = {_FILE_KINDS.get(path.suffix) for path in files.values()}
        if len(kinds) != 1 or None in kinds:
            held = ", ".join(path.name for path in files.values()) or "nothing"
            raise InputError(
                f"{task} of --task_data holds {held}: expected its splits alone, as SPLIT.jsonl or "
                "all as SPLIT.parquet."
            )
        # datasets takes them for patterns.
        data_files = {split: glob.escape(str(path)) for split, path in files.items()}
        found[task.name] = {
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data_files},
        }
    return found


def _set_shots(name: str, task: Task, shots: int | None) -> None:
    """Sets how many examples a loaded task shows; refuses more than there are."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    asked, examples = task.get_config("num_fewshot"), len(task.sampler.df)
    # A document that may be among the examples is not its own one.
    spare = int(task.fewshot_cfg.split == task.config.test_split)
    if asked and asked + spare > examples:
        raise InputError(
            f"The task {name} is to show {asked} examples besides the document itself and has "
            f"{examples}: lower --shots."
        )


def _generate_only(model: HarnessModel, task: Task, limit: int | None) -> list[dict[str, Any]]:
    """Prompts and answers of a task, none of whose own code sees the answers."""
    task.build_all_requests(limit=limit)
    answers = model.generate_until(task.instances)
    return [
        {"doc_id": request.doc_id, "doc": request.doc, "prompt": request.args[0], "answer": answer}
        for request, answer in zip(task.instances, answers, strict=True)
    ]


def _result(found: Any, name: str) -> TaskResult:
    values = found["results"][name]
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        label = metric if chosen == "none" else f"{metric},{chosen}"
        is_number = isinstance(stderr, int | float)
        metrics[label] = (float(value), float(stderr) if is_number else None)
    is_task = name in found["n-samples"]
    shots = found["n-shot"].get(name) if is_task else None
    return TaskResult(shots, found["n-samples"][name]["effective"] if is_task else None, metrics)


def _task_in(error: Exception) -> Any:
    """The task whose data set was being read when an error was raised, from its stack."""
    trace = error.__traceback__
    while trace is not None:
        found = trace.tb_frame.f_locals.get("self")
        if isinstance(found, Task) and trace.tb_frame.f_code.co_name == "download":
            return found
        trace = trace.tb_next
    return None
