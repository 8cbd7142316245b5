"""One `salt` command as a process of its own, as a person would type it.

In: a verb and its arguments. Out: the command printed, then run; its exit code as an error of ours.
`salt smoke` and `salt study` are made of these.
"""

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence

from salt_jax.errors import InputError, Interrupted, RunFailed


def run_verb(
    verb: str,
    arguments: Sequence[str],
    output: pathlib.Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs `salt VERB ARGUMENTS --output_dir=OUTPUT` and waits for it.

    Args:
      verb: "train".
      arguments: Its flags.
      output: Its output folder.
      environment: Variables on top of this process's.

    Raises:
      InputError: It refused its input (exit code 2).
      Interrupted: It, or this process, was asked to stop, and it has saved (75).
      RunFailed: Any other exit code.
    """
    typed = [verb, *arguments, f"--output_dir={output}"]
    print(f"\n$ salt {shlex.join(typed)}", flush=True)
    # -P: a file of the working directory that is called like a library is not imported.
    command = [sys.executable, "-P", "-m", "salt_jax", *typed]
    with _stop_passed_on() as (received, children):
        child = subprocess.Popen(command, env={**os.environ, **(environment or {})})
        children.append(child)
        if received:
            child.terminate()
        code = child.wait()
    if code == 2:
        raise InputError(f"`salt {verb}` refused its input, as it says above.")
    # It may have been asked so late that it finished.
    if code == 75 or code == -signal.SIGTERM or (code == 0 and received):
        raise Interrupted(f"`salt {verb}` was interrupted: run the same command again to go on.")
    if code != 0:
        raise RunFailed(f"`salt {verb}` ended with exit code {code}.")


@contextlib.contextmanager
def _stop_passed_on() -> Iterator[tuple[list[int], list["subprocess.Popen[bytes]"]]]:
    """Asks children to stop when this process is asked, and lets them save before both end.

    Yields:
      The signals received, and the children, to be added to.
    """
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: types.FrameType | None) -> None:
        del frame
        received.append(number)
        for child in children:
            child.terminate()

    previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received, children
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
