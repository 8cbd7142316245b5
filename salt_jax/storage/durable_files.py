"""Atomic file writes, on disk or in a bucket: a file is complete or absent, even if the writing
process is killed.

Several processes may write the same file at once; the last one to finish wins.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

# The suffix of a killed writer's leftovers: FILE.0123abcd.tmp.
LEFTOVERS = ".*.tmp"


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears as `path` when the block ends without an error; after one,
    nothing is left behind. For a bucket it is a temporary file until then."""
    if "://" in os.fspath(path):
        from salt_jax.storage.buckets import RemoteFolder

        with tempfile.TemporaryDirectory() as folder:
            with open(pathlib.Path(folder, path.name), "wb") as file:
                yield file
            RemoteFolder(os.fspath(path.parent)).put(pathlib.Path(folder), [path.name])
        return
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder and those above it if needed; in a bucket there are none."""
    if "://" not in os.fspath(path):
        path.mkdir(parents=True, exist_ok=True)


def write_new_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically unless it exists already, perhaps by another process."""
    if "://" in os.fspath(path):
        from salt_jax.storage.buckets import change_if

        change_if(os.fspath(path), "0", text.encode())
        return
    temporary = _temporary(path)
    try:
        write_text(temporary, text)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    with whole_file(path) as file:
        file.write(text.encode())


def link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Makes a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
