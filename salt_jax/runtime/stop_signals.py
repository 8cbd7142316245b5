"""The signals that ask a process to stop: what they are, and who handles them for a while."""

import contextlib
import signal
import types
from collections.abc import Callable, Iterator


def stop_signals() -> tuple[signal.Signals, ...]:
    """A scheduler's, Ctrl-C's, and a closed terminal's, but that under nohup, which ignores it."""
    always = (signal.SIGTERM, signal.SIGINT)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return always if ignored else (*always, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals_handled_by(
    handler: Callable[[int, types.FrameType | None], None],
) -> Iterator[None]:
    """Gives the signals that ask to stop to a handler as long as the context lasts."""
    previous = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
