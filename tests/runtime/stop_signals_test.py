"""What asks a process to stop: a closed terminal too, but under nohup."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from salt_jax.runtime.stop_signals import stop_signals, stop_signals_handled_by
from salt_jax.training.stop_requests import StopRequests

# A verb that has nothing to save, and one that saves: both are sent signals by themselves.
STARTING = """
import salt_jax.__main__ as m, salt_jax.main as n, os, signal
n.main = lambda: (os.kill(os.getpid(), signal.SIGHUP), 3)[1]
m.run()
"""


@pytest.mark.parametrize(("nohup", "code"), [(False, 75), (True, 3)])
@pytest.mark.parametrize("stderr", ["told", "gone"])
def test_a_closed_terminal_before_there_is_anything_to_save(
    nohup: bool, code: int, stderr: str
) -> None:
    command = [sys.executable, "-c", STARTING]
    shell = ("trap '' HUP; " if nohup else "") + '"$0" "$@"'
    result = subprocess.run(
        ["bash", "-c", shell if stderr == "told" else f"({shell}) 2> >(exec true)", *command],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == code
    told = "salt: stopped by SIGHUP: run the same command again.\n"
    assert result.stderr == ("" if nohup or stderr == "gone" else told)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """What a handler has received that stands for the one that ends the process at once."""
    seen: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGHUP, before)


def test_a_run_is_asked_by_a_closed_terminal_and_saves_however_often(
    ended: list[int],
) -> None:
    with StopRequests() as stop:
        assert stop.asked_by(3) == ""
        for _ in range(3):  # the shell's, the system's
            hang_up()
        assert stop.asked_by(4) == "SIGHUP"
    assert not ended
    hang_up()
    assert ended == [signal.SIGHUP]


def test_of_several_processes_a_closed_terminal_asks_all(
    ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM is the preemption service's, which tells the others."""
    passed_on: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: passed_on.append(number))
    try:
        with StopRequests(together=True):
            hang_up()
            assert passed_on == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended


def test_under_nohup_nothing_handles_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == (signal.SIGTERM, signal.SIGINT)
        with StopRequests() as stop, stop_signals_handled_by(lambda *_: pytest.fail("handled")):
            hang_up()
            assert not stop.asked_by(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
