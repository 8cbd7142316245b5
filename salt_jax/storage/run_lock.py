"""A lock that allows one process at a time in an output folder.

It is a kernel lock (flock), released whenever the process ends; in a bucket, see `bucket_lock`. On
a file system without locks it has no effect.
"""

import errno
import json
import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

import filelock

from salt_jax.errors import InputError
from salt_jax.storage.bucket_lock import BucketLock, HeldElsewhereError
from salt_jax.storage.buckets import is_remote

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_PATIENCE_SECONDS = 0.5  # to wait for a process that is just ending


class RunLock:
    """A context that releases the lock, if acquired, when it ends."""

    def __init__(self) -> None:
        self._path: pathlib.Path | None = None
        self._lock: filelock.BaseFileLock | BucketLock | None = None

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
        owner = {"verb": verb, "pid": os.getpid(), "host": socket.gethostname()}
        if is_remote(path):
            remote = BucketLock(os.fspath(path), owner)
            try:
                remote.acquire()
            except HeldElsewhereError as error:
                raise InputError(_refusal(folder, error.args[0])) from error
            self._path, self._lock = path, remote
            return
        lock = filelock.FileLock(
            path, _PATIENCE_SECONDS, thread_local=False, fallback_to_soft=False
        )
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(_refusal(folder, _owner_in(path))) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        self._path, self._lock = path, lock
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
            if not is_remote(self._path):  # before releasing: afterwards it may be another's
                self._path.unlink(missing_ok=True)
            self._lock.release()
        self._path = self._lock = None


def _owner_in(path: pathlib.Path) -> dict[str, Any]:
    try:
        owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the owner has just started or ended
        return {}
    return owner


def _refusal(folder: pathlib.Path, owner: Mapping[str, Any]) -> str:
    who = "`salt` process"
    if owner:
        who = f"`salt {owner['verb']}` (process {owner['pid']} on {owner['host']})"
    return (
        f"The output folder {folder} is being written by another {who}: wait until it has ended, "
        "or choose another --output_dir."
    )
