"""Records digests, sizes and malformed lines of input files while they are read.

A file opened through the log is digested as it is read. Its change time tells this and later
processes whether it is still the same file.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, BinaryIO

from salt_jax.errors import InputError
from salt_jax.storage.buckets import BucketError, open_file, state_of

_BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """An input file as it was read: its size, change time (mtime in nanoseconds, or `state_of`'s
    substitute), SHA-256 (hex), and the malformed lines that were skipped."""

    path: str
    bytes: int
    changed_ns: int
    digest: str
    broken_lines: int = 0

    @property
    def unchanged(self) -> bool:
        """Whether the file still has the size and change time that it was read with."""
        try:
            return state_of(self.path) == (self.bytes, self.changed_ns)
        except (OSError, BucketError):
            return False

    def as_source(self) -> dict[str, Any]:
        """The entry for a manifest: the name without its folder, bytes, digest, and malformed lines
        if any."""
        broken = {"broken_lines": self.broken_lines} if self.broken_lines else {}
        name = os.path.basename(self.path)
        return {"file": name, "bytes": self.bytes, "digest": self.digest, **broken}


class ReadingLog:
    """The files that a process reads.

    Attributes:
      broken_lines: Malformed lines that were skipped, by file.
      lost_characters: Characters that the vocabulary dropped, in all files.
    """

    def __init__(self) -> None:
        self.broken_lines: Counter[str] = Counter()
        self.lost_characters = 0
        self._files: dict[str, _DigestedFile] = {}
        self._noted: dict[str, tuple[int, int]] = {}

    def open(self, path: pathlib.Path) -> BinaryIO:
        """Opens a file for sequential reading."""
        self._files[str(path)] = _DigestedFile(path)
        return io.BufferedReader(self._files[str(path)], _BUFFER_BYTES)

    def note(self, path: pathlib.Path) -> None:
        """Records the state of a file that is about to be read without `open`."""
        self._noted[str(path)] = state_of(path)

    def sources(self, paths: Iterable[pathlib.Path]) -> list[SourceFile]:
        """The files as read; those not read to their end are digested now. InputError if a file
        changed while it was read."""
        return [self._source(path) for path in paths]

    def _source(self, path: pathlib.Path) -> SourceFile:
        name = str(path)
        file = self._files.get(name)
        state = file.state if file else self._noted.get(name) or state_of(path)
        digest = (file and file.digest) or source_digest(path)
        source = SourceFile(name, *state, digest, self.broken_lines[name])
        if not source.unchanged:
            raise InputError(
                f"{path} changed while it was read: wait until it is complete, and run the same "
                "command again."
            )
        return source


def source_digest(path: pathlib.Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open_file(path)[0] as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class _DigestedFile(io.RawIOBase):
    """A file that is digested as it is read; `state` is its size and change time when opened, and
    `digest` is set once it was read to its end."""

    def __init__(self, path: pathlib.Path):
        self._file, self.state = open_file(path)
        self._sha256 = hashlib.sha256()
        self.digest: str | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        assert count is not None, "a blocking file always reads"
        self._sha256.update(memoryview(buffer)[:count])
        if not count:
            self.digest = self._sha256.hexdigest()
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
