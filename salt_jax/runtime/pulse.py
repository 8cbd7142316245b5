"""Heartbeats of a run's processes: detects a missing process and names it to the others.

Each process increments a number in the key-value store. Process 0, which holds the store, watches
all; the others watch process 0, which tells them who is missing. Clocks are never compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any, NoReturn, Protocol

from salt_jax.errors import INTERRUPTED
from salt_jax.runtime import environment
from salt_jax.runtime.output_streams import tell_at_once

MISSING_SECONDS = "SALT_MISSING_SECONDS"

_REASON_CHARACTERS = 300
_BEATS = 15  # sent in the time after which a process counts as missing


class Store(Protocol):
    """See key_value_store.py."""

    def put(self, key: str, text: str) -> None: ...

    def get(self, key: str, seconds: float) -> str | None: ...


def patience_seconds() -> float:
    """Seconds without a beat after which a process counts as missing: SALT_MISSING_SECONDS, or
    30."""
    return environment.seconds(MISSING_SECONDS, "30")


class Pulse:
    """Sends this process's heartbeat, and ends this process when another one goes missing.

    Args:
      store: The store that all processes share.
      index: This process.
      count: The number of processes.
      patience: Seconds without a beat after which a process counts as missing.
    """

    def __init__(self, store: Store, index: int, count: int, patience: float) -> None:
        self._store, self._index, self._count = store, index, count
        self._patience, self._beat_seconds = patience, patience / _BEATS
        self._own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
        self._states: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._parent = os.getppid()
        # Two threads, since a write blocks while process 0 is unresponsive.
        self._threads = [
            threading.Thread(target=run, daemon=True, name=run.__name__.strip("_"))
            for run in (self._beat_on, self._watch)
        ]
        self._write()

    def start(self) -> None:
        """Starts beating and watching; every process must have constructed its Pulse."""
        for thread in self._threads:
            thread.start()

    def stop(self, reason: str = "") -> None:
        """Stops, and tells the others why if this process has not finished its work."""
        self._write(ended=reason[:_REASON_CHARACTERS])
        self._stopped.set()
        for thread in self._threads:  # none may be in jax's code when Python ends
            if thread.ident is not None:
                thread.join(self._beat_seconds)

    def fail(self, sentence: str) -> NoReturn:
        """Ends this process at once, from any thread, with exit code 1; the others are told why."""
        self._exit(1, sentence, ended=sentence[:_REASON_CHARACTERS])

    def wait(self) -> None:
        """Waits as long as it takes to find out that a process is missing, which ends this one."""
        if self._threads[1].ident is not None:  # else another process failed before all had begun
            self._threads[1].join(2 * self._patience)

    def beat(self) -> None:
        """Sends one beat."""
        self._write(beat=self._own["beat"] + 1)

    def host_of(self, index: int) -> str:
        """The host of a process."""
        return str(self._state(index).get("host", "an unknown host"))

    def lost(self) -> str:
        """Which process has ended or gone missing; "" if none has."""
        for index in range(1, self._count) if self._index == 0 else (0,):
            state, now = self._state(index), time.monotonic()
            if state.get("lost"):
                return str(state["lost"])
            who = f"process {index} of {self._count} on {self.host_of(index)}"
            if state.get("ended"):
                return f"{who} ended ({state['ended']})"
            beat = state.get("beat")
            last, since = self._seen.setdefault(index, (beat, now))
            if beat != last:
                self._seen[index] = beat, now
            elif now - since > self._patience and "ended" not in state:
                return f"{who} (pid {state.get('pid')}) has gone missing"
        return ""

    def _beat_on(self) -> None:
        while not self._stopped.wait(self._beat_seconds):
            if os.getppid() != self._parent:  # the parent process was killed
                os._exit(INTERRUPTED)
            self.beat()

    def _watch(self) -> None:
        while not self._stopped.wait(self._beat_seconds):
            lost = self.lost()
            if lost and not self._stopped.is_set():
                sentence = f"{lost}: run the same command on every host again to resume."
                news = {"lost": lost[:_REASON_CHARACTERS]} if self._index == 0 else {}
                self._exit(INTERRUPTED, sentence, **news)

    def _exit(self, code: int, sentence: str, **news: str) -> NoReturn:
        """Ends this process, whose main thread may be blocked forever."""
        tell_at_once(sentence)
        if news:
            self._write(**news)
        if self._index == 0:  # the store ends with this process, and jax aborts the others
            time.sleep(3 * self._beat_seconds)
        os._exit(code)

    def _state(self, index: int) -> dict[str, Any]:
        """The state a process last wrote; its last known state if there is no answer."""
        text = self._store.get(str(index), self._beat_seconds)
        if text is not None:
            self._states[index] = json.loads(text)
        return self._states.get(index, {})

    def _write(self, **news: Any) -> None:
        with self._writing:
            if "ended" not in self._own:
                self._own.update(news)
            with contextlib.suppress(RuntimeError):  # process 0 is gone: the watch finds out
                self._store.put(str(self._index), json.dumps(self._own))
