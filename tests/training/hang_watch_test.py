"""A wait that is too long is told of, once, with stacks; a short one is not."""

import itertools
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import CheckpointConfig, SavedModel
from salt_jax.training.evaluation import Evaluator
from salt_jax.training.hang_watch import HangWatch
from salt_jax.training.loop import Loop
from salt_jax.training.stop_requests import StopRequests

PATIENCE = 60


def test_a_long_wait_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    told, sentences = threading.Event(), []

    def report(sentence: str) -> None:
        sentences.append(sentence)
        told.set()

    with HangWatch(0.05, report) as watch:
        with watch.waiting_for("the post"):
            assert told.wait(PATIENCE)
        told.clear()
        with watch.waiting_for("the bus"):
            assert told.wait(PATIENCE)
    assert ["the post" in sentences[0], "the bus" in sentences[1]] == [True, True]
    assert "test_a_long_wait_is_reported" in capfd.readouterr().err


# Who is slow, at which of its calls, and what the run then says that it waits for.
WAITS = (
    (SavedModel, "load_params", 1, "the models to load"),
    (Checkpointer, "latest_step", 1, "the state to start from"),
    (Loop, "_compile", 1, "the steps' programs to compile"),
    (Loop, "_compile_the_rest", 1, "the evaluation's program to compile"),
    (InputPipeline, "batch", 4, "the input pipeline at step 4"),
    (StopRequests, "asked_by", 6, "the processes to agree after step 5"),  # the first is of loading
    (Checkpointer, "save", 1, "the checkpoint of step 6"),
    (Evaluator, "__call__", 2, "the evaluation after step 6"),
    (Checkpointer, "wait", 2, "the checkpoint of step 6 to be on the disk"),
)


def test_a_run_says_what_it_waits_for(
    run_train: Callable[..., pathlib.Path], slm: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences: list[str] = []
    told = threading.Condition()

    def report(sentence: str) -> None:
        with told:
            sentences.append(sentence)
            told.notify_all()

    def slow(function: Callable[..., Any], slow_call: int, what: str) -> Callable[..., Any]:
        calls = itertools.count(1)

        def waits(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == slow_call:
                with told:
                    said = told.wait_for(
                        lambda: any(f"FOR {what}," in x for x in sentences), PATIENCE
                    )
                assert said, f"nothing is said of {what}: {sentences}"
            return function(*args, **kwargs)

        return waits

    for owner, name, slow_call, what in WAITS:
        monkeypatch.setattr(owner, name, slow(getattr(owner, name), slow_call, what))
    monkeypatch.setattr(Loop, "_report", lambda loop, sentence: report(sentence))
    monkeypatch.setattr("salt_jax.commands.train.warn", report)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda *_, **__: None)
    last_only = CheckpointConfig(save_every=0)
    start = {"model": None, "initial": str(slm)}
    run_train(hang_seconds=0.5, evaluate_every=6, checkpoints=last_only, **start)
    for *_, what in WAITS:
        assert sum(f"FOR {what}," in sentence for sentence in sentences) == 1, sentences
