"""`python -m salt_jax` is the `salt` command."""

import os
import signal
import sys
import types

from salt_jax.errors import INTERRUPTED
from salt_jax.runtime import output_streams
from salt_jax.runtime.huge_pages import use_huge_pages
from salt_jax.runtime.stop_signals import stop_signals


def run() -> None:
    """The entry point of the installed `salt` command.

    Until a verb installs a handler of its own, a stop signal ends the process at once: an exception
    could be raised in the middle of an import and be lost. All writes are atomic, so the same
    command can be run again.
    """
    use_huge_pages()
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
