"""stdout and stderr that nobody takes: what the `salt` command has when its pipes' readers go."""

import contextlib
import io
import os
import pathlib
import sys
from collections.abc import Iterator

from salt_jax.preparation.local_runner import Progress
from salt_jax.runtime import output_streams


def print_much(number: int) -> Progress:
    """A job of a preparation that prints, as libraries do."""
    print(f"{number} " * 10_000, flush=True)
    print(f"{number} " * 10_000, flush=True, file=sys.stderr)
    return Progress(number, number)


@contextlib.contextmanager
def broken(
    *descriptors: int, path: str = "", said: pathlib.Path | None = None, encoding: str = "utf-8"
) -> Iterator[None]:
    """Has the process's own streams as `salt` has, some of them broken.

    Args:
      *descriptors: Those that are, 1 or 2.
      path: The file that they write to, "/dev/full" for one; a pipe without a reader by default.
      said: What is said on the others is added to this file.
      encoding: Of both.
    """
    kept = {number: os.dup(number) for number in (1, 2)}
    streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    for number in (1, 2):
        if number in descriptors and not path:
            reader, end = os.pipe()
            os.close(reader)
        else:
            file = path if number in descriptors else said or os.devnull
            end = os.open(file, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if file == said else 0))
        os.dup2(end, number)
        os.close(end)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in (1, 2))
    try:
        output_streams.install()
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
        os.environ.pop("SALT_OUTPUT_LOST", None)
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
