"""Finds tasks of lm-eval by name, and loads them with their data sets."""

import dataclasses
import glob
import json
import logging
import os
import pathlib
import tempfile
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import jinja2
import lm_eval.tasks
from huggingface_hub import constants
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED

from salt_jax.errors import InputError, nearest
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.terminal import say

OWN_TASKS = pathlib.Path(__file__).parent / "tasks"

_HUB_SECONDS = 10.0

# Errors that tasks (code of many authors) and `datasets` raise for files that are missing,
# malformed or refused.
_LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError),
    *(datasets.exceptions.DatasetsError, jinja2.TemplateError),
)

_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Loaded = Sequence[Task | Group]


def load(settings: FewShot) -> Loaded:
    """Loads the tasks and groups of the settings, with their data sets.

    Raises:
      InputError: An unknown name, no such folder, a missing data set or library, files in task_data
        that are not splits, or more shots than there are examples.
    """
    manager = _manager(settings)
    members = {name: dict(_entries(manager, name)) for name in settings.tasks}
    loaded: list[Task | Group] = []
    with tempfile.TemporaryDirectory(prefix="salt_jax_tasks_") as folder:
        if settings.task_data is not None:
            _read_files(manager, members, pathlib.Path(settings.task_data), pathlib.Path(folder))
        _go_offline_if_the_hub_is_unreachable()
        for name in members:
            try:
                found = manager.load(name)
            except _LOADING_ERRORS as error:
                raise InputError(_why(error, name, members[name], settings)) from error
            own_group = found["groups"].get(name)
            loaded += [own_group] if own_group else found["tasks"].values()
    try:
        manager.load(loaded)
    except ValueError as error:  # a task alone and in a group, or in two
        raise InputError(f"{error}: leave one of them out of --tasks.") from error
    for task in leaves(loaded):
        _set_shots(task, settings.shots)
    return loaded


def leaves(loaded: Loaded) -> list[Task]:
    """All tasks, including those of groups."""
    return [
        task
        for one in loaded
        for task in (one.get_all_tasks() if isinstance(one, Group) else [one])
    ]


def data_sets(settings: FewShot, names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """(name, data set, part of it, kind) of each task that the names expand to; loads none.
    InputError for an unknown name, or no such folder."""
    manager = _manager(settings)
    return [
        (task, cfg.get("dataset_path") or "", cfg.get("dataset_name") or "", kind)
        for name in names
        for task, cfg in _entries(manager, name)
        for kind in [cfg.get("output_type") or "its own"]
    ]


def _manager(settings: FewShot) -> lm_eval.tasks.TaskManager:
    """lm-eval's task manager; the tasks of this package and of task_folder precede its own."""
    for name in ("task_folder", "task_data"):
        folder = getattr(settings, name)
        if folder is not None and not pathlib.Path(folder).is_dir():
            held = "YAML files of tasks" if name == "task_folder" else "TASK/SPLIT.jsonl"
            raise InputError(
                f"{name} is {folder}, which is not a folder: name one that holds {held}."
            )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its bootstrap would fork this process with its threads and devices.
    os.environ["DISABLE_MULTIPROC"] = "1"
    os.environ.pop("LOCAL_RANK", None)  # lm-eval gives results to rank 0 alone
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if settings.allow_code_execution else "0"
    folders = [str(OWN_TASKS), *([settings.task_folder] if settings.task_folder else [])]
    return lm_eval.tasks.TaskManager(include_path=folders)


def _entries(manager: lm_eval.tasks.TaskManager, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks that a name expands to, with their settings."""
    if name not in manager.task_index:
        near = nearest(name, manager.all_tasks)
        raise InputError(
            f"There is no task {name or 'without a name'}{near}: name tasks or groups of "
            "lm-eval, of --task_folder, or salt_suite."
        )
    entry = manager.task_index[name]
    settings = entry.cfg or {}
    if name in manager.all_subtasks:
        yield name, settings
        return
    for member in settings.get("task", ()) if settings else sorted(entry.tags):
        inner = member if isinstance(member, str) else member.get("task")
        if isinstance(inner, str) and inner in manager.task_index:
            yield from _entries(manager, inner)


def _read_files(
    manager: lm_eval.tasks.TaskManager,
    members: Mapping[str, Mapping[str, Any]],
    data: pathlib.Path,
    folder: pathlib.Path,
) -> None:
    """Writes YAML files into `folder` that make tasks read their files in `data`."""
    asked = sorted({*members, *(task for tasks in members.values() for task in tasks)})
    found = [data / name for name in asked if (data / name).is_dir()]
    if not found:
        raise InputError(
            f"task_data is {data}, which has no folder for any of the tasks {', '.join(asked)}: "
            "name its folders after tasks."
        )
    for task in found:
        entry = manager.task_index[task.name]
        if entry.kind.name != "TASK":
            raise InputError(
                f"{task} of --task_data has the name of a group, or of a task in Python: name each "
                "folder after one of the tasks that --list_tasks=True shows."
            )
        files = {path.stem: path for path in sorted(task.iterdir())}
        kinds = {_FILE_KINDS.get(path.suffix) for path in files.values()}
        if len(kinds) != 1 or None in kinds:
            held = ", ".join(path.name for path in files.values()) or "nothing"
            raise InputError(
                f"{task} of --task_data holds {held}: expected its splits alone, as SPLIT.jsonl or "
                "all as SPLIT.parquet."
            )
        # `datasets` treats these as patterns.
        patterns = {split: glob.escape(str(path)) for split, path in files.items()}
        changes = {
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": patterns},
        }
        path = folder / f"{task.name}.yaml"
        include = {"include": str(pathlib.Path(entry.yaml_path or "").absolute())}
        path.write_text(json.dumps(include | changes), encoding="utf-8")
        manager.task_index[task.name] = dataclasses.replace(entry, yaml_path=path)


def _go_offline_if_the_hub_is_unreachable() -> None:
    """Uses the cache of data sets alone, since `datasets` retries each file for half a minute."""
    if datasets.config.HF_HUB_OFFLINE:
        return
    try:
        head = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(head, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return  # reachable
    except OSError:
        say(f"{constants.ENDPOINT} can't be reached: data sets are read from the cache alone.")
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _why(error: Exception, name: str, members: Mapping[str, Any], settings: FewShot) -> str:
    """A sentence that says why a task, or one of a group, can't be loaded."""
    if isinstance(error, ModuleNotFoundError):
        library = str(error.name).partition(".")[0]
        return (
            f"The task {name} needs the module {error.name}, which is not installed: pip install "
            f"{library}, or a version of it that has the module, or leave the task out."
        )
    message = str(error).strip().partition("\n")[0].rstrip(".")
    owners = [
        frame.f_locals.get("self")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "download"
    ]
    task = next((owner for owner in owners if isinstance(owner, Task)), None)
    if task is None:
        hint = "correct its YAML file" + ", or its splits in --task_data" * bool(settings.task_data)
        for member, cfg in members.items():
            is_own = member.startswith("salt_")
            if cfg.get("unsafe_code") and not is_own and not settings.allow_code_execution:
                hint = (
                    f"{member} executes code when it is loaded: leave it out (salt_mbpp "
                    "only generates), or set --allow_code_execution=True"
                )
        return f"The task {name} cannot be loaded ({message}): {hint}."
    task_name, own = task.config.task, task.config.dataset_kwargs or {}
    cannot = f"The data set of the task {task_name} cannot be read ({message})"
    if "data_files" in own:
        return (
            f"{cannot}: correct the files of --task_data, or dataset_kwargs.data_files in the "
            "task's YAML file."
        )
    named = [repr(part) for part in (task.DATASET_PATH, task.DATASET_NAME) if part]
    named += [f"{key}={value!r}" for key, value in own.items()]
    return (
        f"{cannot}: where there is a network, run datasets.load_dataset({', '.join(named)}), and "
        "copy the folder HF_DATASETS_CACHE here; or set --task_data=FOLDER and put its splits "
        f"there, as {task_name}/SPLIT.jsonl."
    )


def _set_shots(task: Task, shots: int | None) -> None:
    """Sets the number of examples in a task's prompts; refuses more than there are."""
    own = task.get_config("num_fewshot")
    asked = own or 0 if shots is None or own == 0 else shots
    task.set_config(key="num_fewshot", value=asked)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    examples = len(task.sampler.df)
    # A document that is among the examples is not an example for itself.
    spare = int(task.fewshot_cfg.split == task.config.test_split)
    if asked and asked + spare > examples:
        raise InputError(
            f"The task {task.task_name} needs {asked} examples besides the document itself "
            f"and has {examples}: lower --shots."
        )
