"""Decides when a checkpoint is due by time, after the same step in every process."""

import time

import jax

from salt_jax.errors import Interrupted
from salt_jax.runtime.key_value_store import KeyValueStore

_KEY, _STORE_SECONDS = "save_after", 60.0


class SaveClock:
    """Counts the minutes since the last save began, by the clock of process 0; 0 minutes: never."""

    def __init__(self, minutes: float) -> None:
        self._seconds, self._began, self._step = 60 * minutes, time.perf_counter(), 0
        self._store = KeyValueStore() if minutes and jax.process_count() > 1 else None
        if self._store is not None and jax.process_index() == 0:
            self._store.put(_KEY, "0")

    def restart(self) -> None:
        """Begins to count anew, when a save begins."""
        self._began = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` completed steps; every process must call it after each.

        Raises:
          Interrupted: Process 0 does not answer.
        """
        if not self._seconds:
            return False
        if jax.process_index() > 0:
            assert self._store is not None, "there are several processes"
            told = self._store.get(_KEY, _STORE_SECONDS)
            if told is None:
                raise Interrupted("process 0 does not answer: run the same command again.")
            return int(told) == step
        is_over = time.perf_counter() - self._began >= self._seconds
        if self._store is None:
            return is_over
        if is_over and self._step < step:
            # No process ends this step before process 0 has begun the one before it.
            self._step = step + 2
            self._store.put(_KEY, str(self._step))
        return self._step == step
