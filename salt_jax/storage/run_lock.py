"""One process at a time in an output folder.

In: a folder that this process is about to write into. Out: it alone may, until it has ended,
however it ends: the lock is the kernel's (flock) and goes with the process. A file system that
knows no locks keeps nobody out.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from typing import IO

from salt_jax.errors import InputError

LOCK_FILE = ".lock"


class RunLock:
    """Used as a context, at whose end the folder is free again."""

    def __init__(self) -> None:
        self._path: pathlib.Path | None = None
        self._file: IO[str] | None = None

    def acquire(
        self, folder: pathlib.Path, verb: str, part: str = "", at: pathlib.Path | None = None
    ) -> None:
        """Keeps other processes out; nothing happens where this one has done so already.

        Args:
          folder: The output folder, which exists.
          verb: The verb that writes it, for those who are kept out.
          part: Which part of the work this process does, where several share a folder; each part
            has a lock of its own.
          at: The folder that the lock lies in, if it isn't the output folder itself.

        Raises:
          InputError: Another process has it; its verb, number and host are named.
        """
        path = (at or folder) / (f"{LOCK_FILE}-{part}" if part else LOCK_FILE)
        if self._path == path:
            return
        assert self._path is None, f"{self._path} is held, and {path} is asked for"
        while True:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (kept until the end)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                with file:
                    raise InputError(_refusal(folder, file)) from error
            except OSError:
                pass  # a file system without locks
            # The one before may have taken the file away between the two calls.
            if _is_at(file, path):
                break
            file.close()
        self._path, self._file = path, file
        try:
            file.truncate(0)
            file.write(json.dumps({"verb": verb, "pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        except OSError:  # the disk is full
            self.release()
            raise

    @property
    def is_held(self) -> bool:
        """Whether this process has it."""
        return self._file is not None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets others in, and leaves no file."""
        if self._path is not None and self._file is not None:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what couldn't be written is tried once more
                self._file.close()
        self._path = self._file = None


def _is_at(file: IO[str], path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _refusal(folder: pathlib.Path, file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.load(file)
        who = f"`salt {owner['verb']}` (process {owner['pid']} on {owner['host']})"
    except ValueError:  # it has just begun
        who = "`salt` process"
    return (
        f"The output folder {folder} is being written by another {who}: wait until it has ended, "
        "or choose another --output_dir."
    )
