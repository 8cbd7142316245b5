"""Reports a run that hangs: what it waits for, and the stack of every thread, on stderr.

The run is not stopped, since it may only be slow.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator

_CHECKS = 10  # per `seconds`


class HangWatch:
    """Watches one thread's waits.

    Args:
      seconds: How long a wait may take before it is reported; 0 reports none.
      report: Called with a sentence.
    """

    def __init__(self, seconds: float, report: Callable[[str], None]) -> None:
        self._seconds, self._report = seconds, report
        self._waiting: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hang watch")

    def __enter__(self) -> "HangWatch":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """A context around a wait for `what` ("the input pipeline")."""
        self._waiting = what, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def _watch(self) -> None:
        reported = None
        while not self._ended.wait(self._seconds / _CHECKS):
            waiting = self._waiting
            if waiting is None or waiting is reported:
                continue
            what, since = waiting
            if time.monotonic() - since > self._seconds:
                reported = waiting
                self._report(
                    f"HAS WAITED {self._seconds:g} s FOR {what}, and waits on; this is where its "
                    "threads are (--hang_seconds sets when to say so)"
                )
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
