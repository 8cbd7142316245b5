"""Runs that take as many steps as cost what another did, and follow their schedules to the end."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from salt_jax.distill import schedules
from salt_jax.distill.alignment import Alignment
from salt_jax.errors import InputError
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW
from tests.training.doubles import Killed, kill_at
from tests.training.loop_test import assert_same, metrics_of

Run = Callable[..., pathlib.Path]
RATE = AdamW(WarmupCosine(5e-3, warmup_steps=2, final=1e-3))
PLAIN: dict[str, Any] = {"optimizer": RATE, "evaluate_every": 1000}
WORDS = r"and 5 steps of this run cost .* \(-[12]\.\d%\): leave it"


def summary_of(run: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def with_cost(folder: pathlib.Path, flops: float) -> str:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"train_flops": flops}))
    return str(folder)


@pytest.mark.parametrize(
    "method",
    [
        {"schedule": schedules.NoDistillation()},
        {"schedule": schedules.Step(0.6, 3)},
        {"schedule": schedules.Constant(0.6)},
        {"schedule": schedules.Step(0.6, 2), "alignment": Alignment(stop=4, layer=1)},
    ],
    ids=["baseline", "salt", "rkd", "salt and let"],
)
def test_the_steps_are_those_of_a_run_with_that_cost(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path, method: dict[str, Any]
) -> None:
    """It is bit for bit the run with that number of steps; so the learning rate has followed."""
    if method != {"schedule": schedules.NoDistillation()}:
        method = {**method, "teacher": str(slm)}
    given = run_train(steps=5, **PLAIN, **method)
    target = summary_of(given)["train_flops"]
    for name, factor in (("same", 1.0), ("about", 1.004)):
        like = with_cost(tmp_path / name, target * factor)
        run = run_train(steps=999, flops_of=like, **PLAIN, **method)
        assert summary_of(run)["train_flops"] == target
        assert summary_of(run)["steps"] == 5
        assert_same(given, run)
    with pytest.raises(InputError, match=WORDS):
        run_train(flops_of=with_cost(tmp_path / "far", target * 1.02), **PLAIN, **method)


def test_a_resumed_run_keeps_its_steps(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That other run may be gone, too."""
    given = run_train(steps=5, **PLAIN)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run_train(tmp_path, flops_of=str(given), **PLAIN)
    (given / "summary.json").unlink()
    run_train(tmp_path, flops_of=str(given), **PLAIN)
    assert_same(given, tmp_path)
    assert metrics_of(tmp_path)[-1]["learning_rate"] == metrics_of(given)[-1]["learning_rate"]


def test_what_has_no_cost_yet_is_refused(run_train: Run, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="is not the output folder of a finished"):
        run_train(tmp_path / "run", flops_of=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    adaptive = schedules.Adaptive(0.5, most=3)
    with pytest.raises(InputError, match="Adaptive, whose cost is not known"):
        run_train(flops_of=str(tmp_path), schedule=adaptive)
