"""What tests of training put in the place of a clock and of SIGKILL."""

from typing import Any

import pytest

from salt_jax.training import loop


class Clock:
    """Stands for `time` in the modules that account for it."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it, nothing is cleaned up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, killed_step: int) -> None:
    """Ends runs before a step, once checkpoints are written."""
    original = loop.Loop._step

    def step(self: Any, number: int, *rest: Any) -> Any:
        if number == killed_step:
            self._checkpointer.wait()
            raise Killed
        return original(self, number, *rest)

    monkeypatch.setattr(loop.Loop, "_step", step)
