"""`python -m salt_jax` is the `salt` command."""

import os
import signal
import sys
import types

from salt_jax.errors import INTERRUPTED
from salt_jax.runtime import output_streams
from salt_jax.runtime.stop_signals import stop_signals


def run() -> None:
    """The entry point of the installed `salt` command.

    Until a verb has something to save and says so by a handler of its own, a request to stop ends
    the process at once: an exception could come up anywhere, in the midst of an import too, and be
    lost there. What is written is written atomically, so that the same command can be given again.
    """
    output_streams.install()
    for number in stop_signals():
        signal.signal(number, _stop)
    from salt_jax.main import main

    sys.exit(main())


def _stop(number: int, frame: types.FrameType | None) -> None:
    del frame
    name = signal.Signals(number).name
    output_streams.tell_at_once(f"stopped by {name}: run the same command again.")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    run()
