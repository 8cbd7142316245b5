"""`python -m salt_jax` is the `salt` command."""

import os
import signal
import sys
import types


def run() -> None:
    """The entry point of the installed `salt` command.

    Until a verb has something to save and says so by a handler of its own, a request to stop ends
    the process at once: an exception could come up anywhere, in the midst of an import too, and be
    lost there. What is written is written atomically, so that the same command can be given again.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    from salt_jax.main import main

    sys.exit(main())


def _stop(number: int, frame: types.FrameType | None) -> None:
    del frame
    sentence = f"salt: stopped by {signal.Signals(number).name}: run the same command again.\n"
    os.write(2, sentence.encode())
    os._exit(75)


if __name__ == "__main__":
    run()
