"""The teacher's parameters lie by rules of their own; the steps don't notice."""

import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from salt_jax.commands import train
from salt_jax.data.input_pipeline import Position
from salt_jax.distill import schedules
from salt_jax.errors import Interrupted
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import loop
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.partitioning import DEFAULT_RULES, MeshConfig
from salt_jax.training.teacher import LoadedTeacher

Run = Callable[..., pathlib.Path]
WHOLE_ON_EVERY_DEVICE = tuple((name, None) for name, _ in DEFAULT_RULES)


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shardings of every teacher that a loop loads, in order."""
    loaded: list[Any] = []

    def load(*arguments: Any) -> LoadedTeacher:
        teacher = LoadedTeacher(*arguments)
        loaded.append([array.sharding for array in jax.tree.leaves(teacher.params)])
        return teacher

    monkeypatch.setattr("salt_jax.commands.train.LoadedTeacher", load)
    return loaded


def last_params(run: pathlib.Path) -> list[np.ndarray]:
    loaded = find_model(run, None, "model").load_params(MeshConfig().make())
    return [np.asarray(array) for array in jax.tree.leaves(loaded)]


def metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shardings of the student before every step, in order."""
    seen: list[Any] = []
    step = loop.Loop._step

    def watched(self: Any, number: int, state: Any, *rest: Any) -> Any:
        seen.append([array.sharding for array in jax.tree.leaves(state.params)])
        return step(self, number, state, *rest)

    monkeypatch.setattr(loop.Loop, "_step", watched)
    return seen


def test_a_teacher_may_have_rules_of_its_own(
    run_train: Run, slm: pathlib.Path, teachers: list[Any], students: list[Any]
) -> None:
    assert jax.device_count() == 8
    settings = {"schedule": schedules.Step(omega=0.6, n_kd=3), "teacher": str(slm), "steps": 4}
    like_the_student = run_train(**settings)
    whole = run_train(**settings, teacher_rules=WHOLE_ON_EVERY_DEVICE)
    assert [all(s.is_fully_replicated for s in shardings) for shardings in teachers] == [0, 1]
    assert students[:4] == students[4:]
    assert not any(all(s.is_fully_replicated for s in shardings) for shardings in students)
    for line, expected in zip(metrics(whole), metrics(like_the_student), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for array, expected in zip(last_params(whole), last_params(like_the_student), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-5)


def test_freeing_gives_the_memory_back(slm: pathlib.Path) -> None:
    teacher = LoadedTeacher(find_model(slm, None, "teacher"), MeshConfig().make())
    arrays = jax.tree.leaves(teacher.params)
    teacher.free()
    assert teacher.params is None
    assert all(array.is_deleted() for array in arrays)


def test_a_run_that_is_stopped_while_its_teacher_is_loaded_can_be_started_again(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SavedModel.load_params

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(SavedModel, "load_params", stopped)
    with pytest.raises(Interrupted, match="SIGTERM while models were loaded: run the same"):
        run_train(tmp_path / "run", schedule=schedules.Step(0.5, 3), teacher=str(slm))
    assert not (tmp_path / "run").exists()


def test_a_run_that_another_process_has_continued_can_be_started_again(
    run_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for its newest checkpoint and the lock."""
    run = run_train(steps=2)
    seen = iter([(Position(), {}), train._newest(RunFolder(run, "train"), None)])
    monkeypatch.setattr(train, "_newest", lambda *_: next(seen))
    with pytest.raises(Interrupted, match="by another process: run the same command again"):
        run_train(run, steps=2)
