"""A lock that allows one process at a time in an output folder.

It is a kernel lock (flock), released whenever the process ends. On a file system without locks it
has no effect.
"""

import errno
import json
import os
import pathlib
import socket

import filelock

from salt_jax.errors import InputError

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_PATIENCE_SECONDS = 0.5  # to wait for a process that is just ending


class RunLock:
    """A context that releases the lock, if acquired, when it ends."""

    def __init__(self) -> None:
        self._path: pathlib.Path | None = None
        self._lock: filelock.BaseFileLock | None = None

    def acquire(
        self, folder: pathlib.Path, verb: str, part: str = "", at: pathlib.Path | None = None
    ) -> None:
        """Locks a folder; does nothing if this object already holds the lock.

        Args:
          folder: The output folder, which exists.
          verb: The verb that writes it, for other processes' messages.
          part: This process's part of the work; each part has its own lock.
          at: The folder of the lock file, if it isn't the output folder.

        Raises:
          InputError: Another process holds it; its verb, pid and host are named.
        """
        path = (at or folder) / (f"{LOCK_FILE}-{part}" if part else LOCK_FILE)
        if self._path == path:
            return
        assert self._path is None, f"{self._path} is held, and {path} is asked for"
        lock = filelock.FileLock(
            path, _PATIENCE_SECONDS, thread_local=False, fallback_to_soft=False
        )
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(_refusal(folder, path)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        self._path, self._lock = path, lock
        owner = {"verb": verb, "pid": os.getpid(), "host": socket.gethostname()}
        try:
            path.write_text(json.dumps(owner), encoding="utf-8")
        except OSError:  # the disk is full
            self.release()
            raise

    @property
    def is_held(self) -> bool:
        """Whether the lock is held."""
        return self._path is not None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Releases the lock and removes its file."""
        if self._path is not None and self._lock is not None:
            self._path.unlink(missing_ok=True)  # before releasing: afterwards it may be another's
            self._lock.release()
        self._path = self._lock = None


def _refusal(folder: pathlib.Path, path: pathlib.Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        who = f"`salt {owner['verb']}` (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError):  # the owner has just started or ended
        who = "`salt` process"
    return (
        f"The output folder {folder} is being written by another {who}: wait until it has ended, "
        "or choose another --output_dir."
    )
