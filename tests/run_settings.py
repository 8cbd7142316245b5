"""Settings of small runs for tests, given by flat names: each goes to the group that has it."""

import dataclasses
from typing import Any

from salt_jax.preparation.packing import Packing
from salt_jax.preparation.runners import JobRunner
from salt_jax.training import config

# Names that are not those of a field.
_PLACES = {
    "teacher": ("teacher", "path"),
    "teacher_step": ("teacher", "step"),
    "teacher_dtype": ("teacher", "dtype"),
    "teacher_rules": ("teacher", "rules"),
    "teacher_objectives": ("teacher", "objectives"),
    "initial": ("initial", "path"),
    "initial_step": ("initial", "step"),
    "stacked": ("initial", "stacked"),
    "data_seed": ("data", "seed"),
    "cache_weights": ("data", "weights"),
    "evaluate_every": ("evaluation", "every"),
    "evaluation_rows": ("evaluation", "rows"),
}
_GROUPS = {
    "data": config.Data,
    "method": config.Method,
    "devices": config.Devices,
    "evaluation": config.Evaluation,
}


def train_config(**settings: Any) -> config.TrainConfig:
    """The settings of `salt train` from flat ones: cache, teacher, teacher_step, mesh, steps, …"""
    groups: dict[str, dict[str, Any]] = {name: {} for name in [*_GROUPS, "teacher", "initial"]}
    own: dict[str, Any] = {}
    for name, value in settings.items():
        in_groups = [g for g, kind in _GROUPS.items() if name in _fields(kind)]
        group, field = _PLACES.get(name, (in_groups[0] if in_groups else "", name))
        if name in _fields(config.TrainConfig) and name not in _PLACES:
            group = ""
        (groups[group] if group else own)[field] = value
    teacher, initial = groups.pop("teacher"), groups.pop("initial")
    if teacher.get("path") is not None:
        groups["method"]["teacher"] = config.Teacher(**teacher)
    if initial.get("path") is not None:
        own["initial"] = config.Initial(**initial)
    made = {name: kind(**groups[name]) for name, kind in _GROUPS.items()}
    return config.TrainConfig(**made, **own)


def prepare_settings(**settings: Any) -> dict[str, Any]:
    """The settings of `salt prepare` from flat ones: task, sequence_length, workers, …"""
    if settings.pop("skip_broken_lines", False):
        settings["task"] = dataclasses.replace(settings["task"], skip_broken_lines=True)
    for group, kind in (("rows", Packing), ("jobs", JobRunner)):
        own = {name: settings.pop(name) for name in [*settings] if name in _fields(kind)}
        settings[group] = kind(**own)
    return settings


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
