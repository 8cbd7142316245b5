"""The signals that ask a process to stop, and a temporary handler for them."""

import contextlib
import signal
import types
from collections.abc import Callable, Iterator


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT, and SIGHUP unless nohup ignores it."""
    always = (signal.SIGTERM, signal.SIGINT)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return always if ignored else (*always, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals_handled_by(
    handler: Callable[[int, types.FrameType | None], None],
) -> Iterator[None]:
    """A context that installs a handler for the stop signals."""
    previous = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
