"""Folders that are read, on disk or in a bucket; of a bucket's large files only the parts needed.

A bucket's folder is listed once and its small files are copied. A large file is a sparse file on
this machine, into which blocks are fetched when they are first read; processes share it. The sparse
files together stay below SALT_LOCAL_COPIES_GB (by default half of their disk): the least recently
used go first.
"""

import contextlib
import mmap
import os
import pathlib
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import filelock

from salt_jax.errors import InputError
from salt_jax.storage.buckets import RemoteFile, RemoteFolder, is_remote
from salt_jax.storage.json_files import no_link_out, require_inside
from salt_jax.storage.local_copies import Copy, copies_folder, copy_below, local_folder

MOST_GB = "SALT_LOCAL_COPIES_GB"
BLOCK = 128 * 2**10
_SUFFIX = ".blocks"
# Bytes fetched between two looks at how much there is.
_LOOK_BYTES = 256 * 2**20
_DISK_BLOCK = 512  # the unit of stat's st_blocks


class InputFolder:
    """A folder to read. `path` has all of its files or, for a bucket's folder, those that are not
    `large`.

    Raises:
      InputError: The bucket cannot be read, or has nothing there.
    """

    def __init__(
        self, path: str | os.PathLike[str], large: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.remote = RemoteFolder(os.fspath(path)) if is_remote(path) else None
        self.large: Mapping[str, RemoteFile] = {}
        self._copies: dict[str, BlockCopy] = {}
        self._fetched = _LOOK_BYTES  # so that the first time looks
        if self.remote is None:
            self.path = local_folder(path)
            return
        copy = Copy(self.remote, copy_below("input", self.remote))
        with filelock.FileLock(copy.control / "lock"):  # one process of this machine fetches
            there = copy.fetch(lambda name: not large(name))
        if not there:
            raise InputError(f"There is nothing in {self.remote.url}: name another folder.")
        self.path, self._blocks = copy.path, copy.control / "blocks"
        self.large = {name: file for name, file in there.items() if large(name)}

    @property
    def url(self) -> str:
        """Its name, for messages."""
        return self.remote.url if self.remote else str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": {}}

    def sizes(self, files: Iterable[str], remedy: str) -> dict[str, int]:
        """The bytes of those of these files that exist, from a listing of each folder; InputError,
        ending in `remedy`, if one lies outside of this folder."""
        wanted = list(files)
        for file in wanted:
            require_inside(str(self.path), file, remedy)
        if self.remote is not None:
            return {file: self.large[file].bytes for file in wanted if file in self.large}
        found = {}
        for parent in {os.path.dirname(file) for file in wanted}:
            folder = no_link_out(self.path, self.path / parent, remedy)
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    found.update({os.path.join(parent, entry.name): entry for entry in entries})
        sizes = {}
        for file in wanted:
            if entry := found.get(file):
                if entry.is_symlink():
                    no_link_out(self.path, self.path / file, remedy)
                with contextlib.suppress(FileNotFoundError):  # a link to nothing
                    sizes[file] = entry.stat().st_size
        return sizes

    def copy(self, file: str) -> "BlockCopy":
        """The copy of a large file of a bucket's folder."""
        copy = self._copies.get(file)
        if copy is None or not copy.is_current:
            quoted = urllib.parse.quote(f"{file} {self.large[file].version}", safe="")
            path = self._blocks / f"{quoted}{_SUFFIX}"
            copy = self._copies[file] = BlockCopy(self.url, file, self.large[file].bytes, path)
        return copy

    def whole(self, file: str) -> os.PathLike[str]:
        """A file with all of its bytes."""
        if self.remote is None:
            return self.path / file
        copy = self.copy(file)
        self.fetch([(copy, 0, copy.bytes)])
        return copy

    def fetch(self, wanted: Iterable[tuple["BlockCopy", int, int]]) -> None:
        """Makes sure that ranges of copies, from one byte to before another, have been fetched: all
        that are missing at once, neighbouring blocks in one request."""
        assert self.remote is not None, "files on disk are read in place"
        missing = {
            (copy, block)
            for copy, start, end in wanted
            for block in range(max(start, 0) // BLOCK, -(-min(end, copy.bytes) // BLOCK))
            if not copy.present[block]
        }
        if not missing:
            return
        runs: list[tuple[BlockCopy, int, int]] = []
        for copy, block in sorted(missing, key=lambda one: (one[0].file, one[1])):
            if runs and runs[-1][0] is copy and runs[-1][2] == block:
                runs[-1] = (copy, runs[-1][1], block + 1)
            else:
                runs.append((copy, block, block + 1))
        parts = self.remote.ranges(
            [(c.file, first * BLOCK, min(last * BLOCK, c.bytes)) for c, first, last in runs]
        )
        for (copy, first, last), part in zip(runs, parts, strict=True):
            copy.write(first, last, part)
        self._fetched += sum(map(len, parts))
        if self._fetched >= _LOOK_BYTES:
            self._fetched = 0
            make_room()


class BlockCopy(os.PathLike[str]):
    """A sparse file with the blocks of a bucket's file that have been fetched.

    It may be removed at any time to make room (`is_current` is then False): this process still
    reads it while this object lives.

    Attributes:
      file: The file's name in its folder.
      bytes: Its size.
      present: For each block 1 if it has been fetched; shared by processes.
    """

    def __init__(self, url: str, file: str, size: int, path: pathlib.Path) -> None:
        self._url, self.file, self.bytes, self._path = url, file, size, path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _room_lock():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.truncate(self._descriptor, size)
            with open(_present(path), "a+b") as present:
                present.truncate(-(-size // BLOCK) or 1)
                self.present = mmap.mmap(present.fileno(), 0)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __fspath__(self) -> str:
        return f"/dev/fd/{self._descriptor}"

    def __str__(self) -> str:
        return f"{self._url}/{self.file}"

    @property
    def is_current(self) -> bool:
        """Whether others find it too; also notes that it is in use."""
        os.utime(self._descriptor)
        return os.fstat(self._descriptor).st_nlink > 0

    def part(self, start: int, end: int) -> bytes:
        """Bytes that have been fetched."""
        return os.pread(self._descriptor, end - start, start)

    def write(self, first: int, last: int, data: bytes) -> None:
        """Keeps blocks, from one to before another."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], first * BLOCK + done)
        self.present[first:last] = b"\1" * (last - first)

    def discard(self) -> None:
        """Removes it, so that it is fetched anew."""
        with _room_lock():
            if os.fstat(self._descriptor).st_nlink:
                _remove(self._path)


def make_room() -> None:
    """Removes the least recently used copies until the others are within the bound."""
    below, given = copies_folder(), os.environ.get(MOST_GB, "")
    try:
        most = float(given) * 1e9 if given else shutil.disk_usage(below).total / 2
        if not most > 0:
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"{MOST_GB} is {given!r}, expected gigabytes above 0: correct it."
        ) from error
    with _room_lock():
        found = [(path.stat(), path) for path in below.glob(f"input/*/*.copy/blocks/*{_SUFFIX}")]
        used = sum(status.st_blocks * _DISK_BLOCK for status, _ in found)
        for status, path in sorted(found, key=lambda one: one[0].st_mtime_ns):
            if used <= most:
                return
            _remove(path)
            used -= status.st_blocks * _DISK_BLOCK


def _room_lock() -> filelock.BaseFileLock:
    """Held while a copy is opened or removed, which are two files."""
    return filelock.FileLock(copies_folder() / "blocks.lock")


def _present(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".present")


def _remove(path: pathlib.Path) -> None:
    _present(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
