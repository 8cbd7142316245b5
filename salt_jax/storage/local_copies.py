"""Local copies of folders and files in buckets.

Only files that changed in the bucket are fetched again. Copies are kept below SALT_LOCAL_COPIES, by
default ~/.cache/salt_jax, or a temporary folder if that can't be written.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import filelock

from salt_jax.errors import InputError
from salt_jax.storage.buckets import RemoteFile, RemoteFolder, completes, is_remote
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.manifests import DIGESTS_FILE
from salt_jax.storage.user_folders import cache_folder, writable
from salt_jax.terminal import say

COPIES = "SALT_LOCAL_COPIES"

_LONGEST_NAME = 200

# A file's size, mtime in nanoseconds and inode; () if there is no file.
FileState = tuple[int, ...]


class Copied(NamedTuple):
    """The bucket's file when it and its copy were last in sync (None during a transfer), and the
    copy's `state_on_disk` then."""

    there: RemoteFile | None
    here: FileState


class Copy:
    """A local copy (`path`) of a bucket's folder; `control`, a folder beside it, holds locks and
    the record of files in sync."""

    def __init__(self, folder: RemoteFolder, path: pathlib.Path) -> None:
        self.folder, self.path = folder, path
        self.control = path.with_name(f"{path.name}.copy")
        self.control.mkdir(parents=True, exist_ok=True)
        self._record = self.control / "copied.json"

    def known(self) -> dict[str, Copied]:
        """The files copied in either direction, by name."""
        try:
            known = json.loads(self._record.read_text(encoding="utf-8"))
            return {
                str(name): Copied(there and RemoteFile(*there), tuple(map(int, here)))
                for name, (there, here) in known.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def note(self, files: Mapping[str, Copied]) -> None:
        """Records files as copied."""
        write_text(self._record, json.dumps(files, indent=0))

    def fetch(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, RemoteFile]:
        """Updates the copy from the bucket, and returns all that is there; unwanted files are not
        fetched, but kept if they were copied before and the bucket still has them. InputError if
        the disk has too little space."""
        there, known = self.folder.files(), self.known()
        current = {
            name: copied
            for name, copied in known.items()
            if there.get(name) == copied.there and state_on_disk(self.path / name) == copied.here
        }
        for name in sorted(known.keys() - there.keys(), key=completes, reverse=True):
            self.drop(name)
        missing = [name for name in there if wanted(name) and name not in current]
        if missing:
            total = sum(there[name].bytes for name in missing)
            self._require_space(total)
            say(
                f"Copying {len(missing)} files, {total / 1e6:,.1f} MB, from {self.folder.url} to "
                f"{self.path}"
            )
            self.note(current)
            self.folder.fetch(self.path, missing)
        new = {name: Copied(there[name], state_on_disk(self.path / name)) for name in missing}
        if missing or known.keys() != current.keys():
            self.note(current | new)
        return there

    def drop(self, name: str) -> None:
        """Removes a file from the copy, and folders that become empty."""
        file = self.path / name
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in file.relative_to(self.path).parents:
                (self.path / folder).rmdir()

    def _require_space(self, needed: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InputError(
                f"The disk of {self.path} has {free / 1e6:,.0f} MB free, and the copy of "
                f"{self.folder.url} needs {needed / 1e6:,.0f} MB: set {COPIES} to a folder on a "
                "larger disk, or mount the bucket."
            )


def local_folder(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> pathlib.Path:
    """A local folder: the path itself, or a copy of the wanted files of a bucket's folder;
    InputError if that cannot be read or is empty."""
    if not os.fspath(path):
        raise InputError("A folder has an empty name: name the one that is meant.")
    if not is_remote(path):
        return pathlib.Path(path)
    folder = RemoteFolder(os.fspath(path))
    copy = Copy(folder, copy_below("input", folder))
    with filelock.FileLock(copy.control / "lock"):  # one process of this machine fetches
        copy.fetch(wanted)
    if not copy.path.is_dir():
        raise InputError(f"There is nothing in {folder.url}: name another folder.")
    return copy.path


def local_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """A local file: the path itself, or a copy of a bucket's file; InputError if that cannot be
    read or doesn't exist."""
    if not is_remote(path):
        return pathlib.Path(path)
    folder, _, name = os.fspath(path).rpartition("/")
    file = local_folder(folder, lambda other: other == name) / name
    if not file.exists():
        raise InputError(f"There is no file {os.fspath(path)}: name another.")
    return file


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything at a path, or in a bucket's folder; InputError if the bucket cannot
    be read."""
    if is_remote(path):
        return bool(RemoteFolder(os.fspath(path)).files())
    return bool(os.fspath(path)) and pathlib.Path(path).exists()


def local_run(path: str | os.PathLike[str], step: int | None = None) -> pathlib.Path:
    """As `local_folder`, of a run without its checkpoints, but for that of `step` in s3://: Orbax
    reads gs:// itself."""
    kept = (f"checkpoints/{step}/",) if os.fspath(path).startswith("s3://") else ()
    return local_folder(
        path, lambda name: not name.startswith("checkpoints/") or name.startswith(kept)
    )


def remote_steps(files: Collection[str]) -> list[int]:
    """The steps of complete checkpoints among a run's file names, ascending."""
    found = (re.fullmatch(rf"checkpoints/(\d+)/{DIGESTS_FILE}", name) for name in files)
    return sorted(int(match[1]) for match in found if match)


def state_on_disk(path: pathlib.Path) -> FileState:
    """A file's state, which changes whenever its content does."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ino


def copy_below(kind: str, folder: RemoteFolder) -> pathlib.Path:
    """The path of a folder's copy, for reading ("input") or writing ("output"); it keeps the
    folder's name, and no copy is inside another."""
    below = copies_folder()
    place = urllib.parse.quote(folder.url, safe="")
    if len(place) > _LONGEST_NAME:
        place = f"{place[:100]}-{hashlib.sha256(folder.url.encode()).hexdigest()}"
    return below / kind / place / folder.parts[-1]


def copies_folder() -> pathlib.Path:
    """The folder below which all copies lie; InputError if it cannot be written."""
    if not (given := os.environ.get(COPIES)):
        return cache_folder("salt_jax", COPIES)
    try:
        return writable(given)
    except OSError as error:
        raise InputError(
            f"{COPIES} is {given}, which cannot be written ({error.strerror}): set it to a folder "
            "that can."
        ) from error
