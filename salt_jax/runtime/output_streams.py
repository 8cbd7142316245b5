"""stdout and stderr that never fail: output is no reason to stop.

In: the process's own streams. Out: streams in their place, which show as `?` what their encoding
doesn't have and drop what nobody takes: the reader of a pipe has gone, a terminal was closed, a
disk is full. The first loss on stdout is told of on stderr.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

STDOUT, STDERR = 1, 2
# Set in the environment once a loss is told of: the commands that this one starts needn't.
_TOLD = "SALT_OUTPUT_LOST"
# What these refuse now they may take later.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def install() -> None:
    """Takes the place of sys.stdout and sys.stderr, before anything else opens a file."""
    _Descriptor.untold = ()
    for descriptor in (0, STDOUT, STDERR):
        _hold(descriptor)
    sys.stdout = sys.__stdout__ = _stream(sys.stdout, STDOUT)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(sys.stderr, STDERR)  # type: ignore[misc]


def print_only() -> None:
    """For a command that does nothing but print: its reader may go, as of `| head`, untold."""
    _Descriptor.untold = (errno.EPIPE,)


def tell_at_once(sentence: str) -> None:
    """Tells a sentence on stderr, also from a signal's handler or just before the process ends."""
    with contextlib.suppress(OSError):
        os.write(STDERR, f"salt: {sentence}\n".encode(errors="replace"))


def _hold(descriptor: int) -> None:
    """Opens a descriptor that is closed, to be told of a write, and lest a file get its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        # The lowest number that is free is given, so this one; child processes have it too.
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _stream(replaced: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    """A stream to a descriptor, for the one that Python made, if it found the descriptor open."""
    return io.TextIOWrapper(
        _Descriptor(descriptor, "w", closefd=False),
        encoding=replaced.encoding if replaced else "utf-8",
        errors="replace",
        line_buffering=getattr(replaced, "line_buffering", True),
        write_through=getattr(replaced, "write_through", False),
    )


class _Descriptor(io.FileIO):
    """A descriptor's bytes, which always take all that is written."""

    untold: tuple[int, ...] = ()

    def write(self, data: Any, /) -> int:
        whole = left = memoryview(data).cast("B")
        try:
            while left:
                written = super().write(left)
                if written is None:  # it doesn't block, and its reader is slow
                    select.select([], [self], [])
                else:
                    left = left[written:]
        except OSError as error:
            self._lose(error)
        return whole.nbytes

    def _lose(self, error: OSError) -> None:
        if error.errno not in _FULL:  # from here on nowhere, for libraries and child processes too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        if self.fileno() != STDOUT or _TOLD in os.environ or error.errno in self.untold:
            return
        os.environ[_TOLD] = "1"
        tell_at_once(
            f"stdout takes nothing more ({error.strerror}): what is printed there is lost, and the "
            "command goes on."
        )
