"""The pulse: a process that is gone is named to all others, and no other process is."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from salt_jax.errors import InputError
from salt_jax.runtime import pulse as pulse_module
from salt_jax.runtime.pulse import Pulse, patience_seconds

Beats = Callable[..., list[str]]


class FakeStore:
    """The store of all processes; after `cut` a process's calls fail."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.cut = False

    def put(self, key: str, text: str) -> None:
        if self.cut:
            raise RuntimeError("UNAVAILABLE")
        self.texts[key] = text

    def get(self, key: str, seconds: float) -> str | None:
        return None if self.cut else self.texts[key]


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Beats:
    """So many beats of pulses in turn, two seconds apart by a clock of their own."""
    now = [0.0]
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now[0])

    def beat(count: int, *pulses: Pulse) -> list[str]:
        lost = []
        for _ in range(count):
            now[0] += 2.0
            for pulse in pulses:
                pulse.beat()
                lost.append(pulse.lost())
        return lost

    return beat


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def pulses(store: FakeStore, count: int) -> list[Pulse]:
    return [Pulse(store, index, count, 30.0) for index in range(count)]


def test_a_process_without_a_beat_is_missing(store: FakeStore, beats: Beats) -> None:
    first, second, third = pulses(store, 3)
    assert not any(beats(20, first, second, third))
    lost = beats(20, first, third)
    assert lost[0] == ""
    assert f"process 1 of 3 on {socket.gethostname()}" in lost[-2]
    assert "gone missing" in lost[-2]
    assert lost[-1] == "", "the others are told by process 0"
    assert "process 0 of 3" in beats(20, third)[-1], "which they watch"


def test_the_reason_of_an_end_is_told(store: FakeStore, beats: Beats) -> None:
    first, second = pulses(store, 2)
    second.stop("É" * 10_000)
    second.beat()
    assert "process 1 of 2" in first.lost()
    assert "ended (ÉÉ" in first.lost()


def test_a_process_that_has_finished_is_not_missing(store: FakeStore, beats: Beats) -> None:
    first, second = pulses(store, 2)
    second.stop()
    assert not any(beats(40, first))


def test_a_slow_store_makes_nobody_missing(store: FakeStore, beats: Beats) -> None:
    first, second = pulses(store, 2)
    for _ in range(20):
        store.cut = True
        assert not any(beats(13, first, second)), "26 seconds without an answer"
        store.cut = False
        assert not any(beats(1, first, second))
    store.cut = True
    assert "process 0 of 2 on" in beats(20, second)[-1]


def test_an_error_before_all_have_begun_is_not_waited_on(store: FakeStore) -> None:
    first, _ = pulses(store, 2)
    first.wait()


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf", "nan"])
def test_bad_patience_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALT_MISSING_SECONDS", given)
    with pytest.raises(InputError, match=r"SALT_MISSING_SECONDS is .*, expected seconds above 0"):
        patience_seconds()


# One of three processes, which meet and then do nothing.
MEMBER = """
import sys
from salt_jax.runtime import processes
address, index = sys.argv[1:]
flags = {"coordinator_address": address, "process_count": "3", "process_index": index}
processes.join(flags).watch()
print("watching", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def members() -> Iterator[tuple[list["subprocess.Popen[str]"], int]]:
    """Three processes that watch each other, and the end of the pipe that their parent reads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    read, write = os.pipe()
    environment = {**os.environ, "SALT_MISSING_SECONDS": "6", "SALT_GUARDED": str(write)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, address, str(index)],
            env=environment,
            pass_fds=[write],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    os.close(write)
    for member in started:
        assert member.stdout is not None
        assert "watching\n" in iter(member.stdout.readline, "")
    yield started, read
    for member in started:
        member.kill()
        member.communicate()
    os.close(read)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_each_process_that_is_killed_or_stands_still_is_named_to_all_others(
    victim: int, by: signal.Signals, members: tuple[list["subprocess.Popen[str]"], int]
) -> None:
    started, pipe = members
    # By what each has written there, the process that started it can name process 0 where jax
    # aborts the others before they can.
    assert os.read(pipe, 1024).decode() == 3 * socket.gethostname()
    started[victim].send_signal(by)
    for index in {0, 1, 2} - {victim}:
        _, error = started[index].communicate(timeout=60)
        if victim == 0 and started[index].returncode == -signal.SIGABRT:
            continue
        assert started[index].returncode == 75, error
        assert f"salt: process {victim} of 3 on {socket.gethostname()}" in error
