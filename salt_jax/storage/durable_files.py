"""Files that are whole or absent, whatever stops the process that writes them.

In: a path and what is to be in the file. Out: the file, under its name only once all of it is on
the disk. Several processes may write the same file at once; the last one to finish has it.
"""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

# What a killed writer may leave, after the file's name: FILE.0123abcd.tmp.
LEFTOVERS = ".*.tmp"


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears as `path` when the block ends without an error.

    Raises:
      OSError: The disk is full, say; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole text file unless there is one already, another process's too."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_text(temporary, text)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole text file."""
    with whole_file(path) as file:
        file.write(text.encode())
