"""A wait that is too long is told of, once, with stacks; a short one is not."""

import pathlib
import threading
from collections.abc import Callable

import pytest

from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.training.hang_watch import HangWatch

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


def test_a_run_says_what_it_waits_for(
    run_train: Callable[..., pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    read, told = InputPipeline.batch, threading.Event()

    def slow(self: InputPipeline, step: int) -> object:
        if step == 3:
            assert told.wait(PATIENCE)
        return read(self, step)

    def dump(*_: object, **__: object) -> None:
        told.set()

    monkeypatch.setattr(InputPipeline, "batch", slow)
    monkeypatch.setattr("salt_jax.training.hang_watch.faulthandler.dump_traceback", dump)
    run_train(hang_seconds=0.5)
    assert "FOR the input pipeline at step 4" in capfd.readouterr().err
