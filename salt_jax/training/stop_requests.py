"""Stop requests by signal, deferred until the run can be saved."""

import os
import signal
import types

from jax.experimental import multihost_utils

from salt_jax.runtime.stop_signals import stop_signals


class StopRequests:
    """Defers signals inside the context; a second SIGTERM or SIGINT takes effect at once.

    With several processes (`together`) a request to one of them stops all after the same step, by
    JAX's preemption service, which then handles SIGTERM.
    """

    def __init__(self, together: bool = False) -> None:
        self._together = together
        self._received: list[str] = []
        self._previous = {
            number: signal.getsignal(number)
            for number in stop_signals()
            if not (together and number == signal.SIGTERM)
        }

    def __enter__(self) -> "StopRequests":
        for number in self._previous:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked_by(self, step: int) -> str:
        """The signal that asks to stop after `step` completed steps, or "" to continue.

        Every process must call it after every step.
        """
        if not self._together:
            return self._received[0] if self._received else ""
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._received.append(signal.Signals(number).name)
        if number != signal.SIGHUP:  # which a shell and the system may send several times
            signal.signal(number, self._previous[signal.Signals(number)])
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
