"""Saves by time: when they are due, and that a run is the same with them."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.training import loop, save_clock
from salt_jax.training.checkpoints import CheckpointConfig, complete_steps, find_model
from salt_jax.training.partitioning import MeshConfig
from tests.training.doubles import Clock, Killed, kill_at

Run = Callable[..., pathlib.Path]


@pytest.fixture
def minute_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes a minute, in which a checkpoint is written."""
    clock, original = Clock(), loop.Loop._step
    monkeypatch.setattr(save_clock, "time", clock)

    def step(self: Any, *given: Any) -> Any:
        clock.now += 60.0
        self._checkpointer.wait()
        return original(self, *given)

    monkeypatch.setattr(loop.Loop, "_step", step)


@pytest.mark.usefixtures("minute_steps")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_minutes": 1.5}, [2, 4, 6]),
        ({"save_minutes": 3.0}, [3, 6]),
        ({"save_minutes": 2.0, "keep_steps": (1,)}, [1, 3, 5, 6]),  # any save begins the count
        ({"save_minutes": 0.0}, [6]),
    ],
)
def test_saves_after_the_first_step_that_ends_late_enough(
    run_train: Run, settings: dict[str, Any], expected: list[int]
) -> None:
    saves = CheckpointConfig(save_every=0, keep_last=9, **settings)
    assert complete_steps(run_train(checkpoints=saves)) == expected


@pytest.mark.usefixtures("minute_steps")
def test_a_run_that_resumes_from_such_a_save_is_the_same(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_train(checkpoints=CheckpointConfig(save_every=0))
    by_time = CheckpointConfig(save_every=0, save_minutes=3.0, keep_last=9)
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            run_train(tmp_path, checkpoints=by_time)
    assert complete_steps(tmp_path) == [3]
    run_train(tmp_path, checkpoints=by_time)
    assert complete_steps(tmp_path) == [3, 6]
    mesh = MeshConfig().make()
    ours, theirs = (find_model(run, 6, "model").load_params(mesh) for run in (tmp_path, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_minutes_that_are_none(minutes: float) -> None:
    with pytest.raises(InputError, match=f"save_minutes is {minutes}: set it to the minutes"):
        CheckpointConfig(save_minutes=minutes)
