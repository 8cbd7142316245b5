"""Runs `salt` commands as child processes, for `salt smoke` and `salt study`."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import INTERRUPTED, InputError, Interrupted, RunFailed
from salt_jax.runtime.processes import GUARDED
from salt_jax.runtime.stop_signals import stop_signals_handled_by
from salt_jax.terminal import say


def run_verb(
    verb: str,
    arguments: Sequence[str],
    output: pathlib.Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs `salt VERB ARGUMENTS --output_dir=OUTPUT`, with `environment` on top of this process's.

    Raises:
      InputError: It refused its input (exit code 2).
      Interrupted: It, or this process, was asked to stop, and it has saved (75).
      RunFailed: Any other exit code.
    """
    typed = [verb, *arguments, f"--output_dir={output}"]
    say("", f"$ salt {shlex.join(typed)}")
    # -P: don't import a file of the working directory in place of a library.
    command = [sys.executable, "-P", "-m", "salt_jax", *typed]
    code, _, received = _run(command, environment or {})
    if code == 2:
        raise InputError(f"`salt {verb}` refused its input, as it says above.")
    # The request may have come too late to stop it.
    if code == INTERRUPTED or code == -signal.SIGTERM or (code == 0 and received):
        raise Interrupted(f"`salt {verb}` was interrupted: run the same command again to resume.")
    if code != 0:
        raise RunFailed(f"`salt {verb}` ended with exit code {code}.")


def check_verbs(commands: Mapping[str, Sequence[str]]) -> None:
    """Checks flags, gin files and settings of commands (VERB and its flags, by a name for messages)
    in a child process, without running them.

    Raises:
      InputError: The first wrong command's name and error.
      Interrupted: This process was asked to stop.
      RunFailed: They could not be checked.
    """
    code = "import sys; from salt_jax.main import check; sys.exit(check(sys.stdin))"
    returned, error, received = _run(
        [sys.executable, "-P", "-c", code],
        {"PYTHONIOENCODING": "utf-8:replace"},
        json.dumps({name: [*typed] for name, typed in commands.items()}),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    if received:
        raise Interrupted("stopped before the first command: run the same command again.")
    if returned == 2:
        raise InputError(error.strip().rpartition("\n")[2])
    if returned != 0:
        raise RunFailed(f"the commands could not be checked: {error.strip()}")


def run_guarded(argv: Sequence[str]) -> tuple[int, str]:
    """Runs `salt ARGV` in a child process, which jax may abort when the coordinator dies; returns
    its exit code, negative for the signal that ended it, and the coordinator's host, "" if it is
    unknown."""
    command = [sys.executable, "-P", "-m", "salt_jax", *argv]
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as told, open(write, "wb", buffering=0):
        os.set_blocking(read, False)
        code, _, _ = _run(command, {GUARDED: str(write)}, pass_fds=[write])
        return code, (told.read(1024) or b"").decode()


def _run(
    command: Sequence[str], environment: Mapping[str, str], given: str | None = None, **options: Any
) -> tuple[int, str, list[int]]:
    """Runs a child process, `given` to its stdin, and forwards stop signals to it, so that it saves
    before this process ends. Returns its exit code, its stderr and the signals."""
    received: list[int] = []
    children: list[subprocess.Popen[Any]] = []

    def stop(number: int, frame: types.FrameType | None) -> None:
        del frame
        # A closing terminal may signal several times, and signal the child too.
        for child in () if received and number == signal.SIGHUP else children:
            child.terminate()
        received.append(number)

    with stop_signals_handled_by(stop):
        child = subprocess.Popen(command, env={**os.environ, **environment}, **options)
        children.append(child)
        if received:
            child.terminate()
        _, error = child.communicate(given)
    return child.returncode, error or "", received
