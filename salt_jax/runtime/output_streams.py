"""Replacements for stdout and stderr whose writes never fail, so that lost output stops no run.

Characters that the encoding lacks become `?`; output that can't be delivered (a closed pipe or
terminal, a full disk) is dropped. The first loss on stdout is reported on stderr.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

STDOUT, STDERR = 1, 2
# Environment variable set once a loss was reported, so that child processes don't repeat it.
_TOLD = "SALT_OUTPUT_LOST"
# After these errors later writes may succeed.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def install() -> None:
    """Replaces sys.stdout and sys.stderr; call it before anything else opens a file."""
    _Descriptor.untold = ()
    for descriptor in (0, STDOUT, STDERR):
        _reopen_if_closed(descriptor)
    sys.stdout = sys.__stdout__ = _stream(sys.stdout, STDOUT)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(sys.stderr, STDERR)  # type: ignore[misc]


def print_only() -> None:
    """Turns off the report of a closed pipe, for commands that only print (to `| head`)."""
    _Descriptor.untold = (errno.EPIPE,)


def tell_at_once(sentence: str) -> None:
    """Prints a sentence to stderr; safe in a signal handler and just before the process exits."""
    with contextlib.suppress(OSError):
        os.write(STDERR, f"salt: {sentence}\n".encode(errors="replace"))


def _reopen_if_closed(descriptor: int) -> None:
    """Reopens a closed descriptor read-only: no other file gets its number, and writes fail."""
    try:
        os.fstat(descriptor)
    except OSError:
        # open() takes the lowest free number, which is this one; child processes inherit it.
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _stream(replaced: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    """A stream on a descriptor; `replaced` is Python's own, None if the descriptor was closed."""
    return io.TextIOWrapper(
        _Descriptor(descriptor, "w", closefd=False),
        encoding=replaced.encoding if replaced else "utf-8",
        errors="replace",
        line_buffering=getattr(replaced, "line_buffering", True),
        write_through=getattr(replaced, "write_through", False),
    )


class _Descriptor(io.FileIO):
    """A raw stream whose writes always succeed."""

    untold: tuple[int, ...] = ()

    def write(self, data: Any, /) -> int:
        whole = left = memoryview(data).cast("B")
        try:
            while left:
                written = super().write(left)
                if written is None:  # non-blocking, and its buffer is full
                    select.select([], [self], [])
                else:
                    left = left[written:]
        except OSError as error:
            self._lose(error)
        return whole.nbytes

    def _lose(self, error: OSError) -> None:
        if error.errno not in _FULL:  # for libraries and child processes too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        if self.fileno() != STDOUT or _TOLD in os.environ or error.errno in self.untold:
            return
        os.environ[_TOLD] = "1"
        tell_at_once(
            f"stdout takes nothing more ({error.strerror}): further output is lost, and the "
            "command continues."
        )
