"""Folders and files in buckets, gs://BUCKET/PATH and s3://BUCKET/PATH, through fsspec.

In: a path as it was typed. Out: where it lies on this machine's disk: itself, or a copy of what the
bucket holds, of which only what has changed there is fetched again. Copies are kept below
SALT_LOCAL_COPIES, ~/.cache/salt_jax by default. Credentials are found by gcsfs and s3fs, as by
Google's and Amazon's own tools; this package never sees them.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from salt_jax.data.durable_files import write_text
from salt_jax.errors import InputError

COPIES = "SALT_LOCAL_COPIES"

# What installs the library of each scheme.
_EXTRAS = {"gs": "gcs", "s3": "s3"}
# By which file systems tell one content of a file from the next.
_VERSIONS = ("generation", "ETag", "etag", "md5Hash", "created", "mtime", "LastModified")
# Files that say that others are complete go last, and are taken away first.
_MARKS = ("COMPLETED", "digests.json")
_ADVICE = "check the name, your rights to it and the network"
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


class BucketError(InputError):
    """A bucket that cannot be read or written: its name, the rights, the network."""


class RemoteFile(NamedTuple):
    """A file's size in bytes, and what changes with its content."""

    bytes: int
    version: str


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


class RemoteFolder:
    """A folder in a bucket.

    Args:
      url: gs://BUCKET/PATH or s3://BUCKET/PATH.

    Raises:
      InputError: Another scheme, no folder, credentials in the URL, or the scheme's library is not
        installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        # Otherwise gcsfs asks for the kind of bucket before each call, and warns where it may not.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        scheme, _, rest = url.partition("://")
        if scheme not in _EXTRAS:
            raise InputError(
                f"{scheme}:// is no kind of path that is known: name a folder on this machine, "
                f"or one of {', '.join(f'{known}://' for known in _EXTRAS)}."
            )
        if re.search(r"[@?#]", rest):
            raise InputError(
                f"A {scheme}:// path holds '@', '?' or '#', which stand for credentials and "
                "queries: name the bucket and the folder alone, and give credentials as gcloud "
                "and aws find them."
            )
        parts = [part for part in rest.split("/") if part]
        if len(parts) < 2 or ".." in parts or "." in parts:
            raise InputError(f"{url} names no folder of a bucket: write {scheme}://BUCKET/FOLDER.")
        self.url = f"{scheme}://{'/'.join(parts)}"
        self.parts = (scheme, *parts)
        self._root = "/".join(parts)
        try:
            self._files = fsspec.filesystem(scheme)
        except ImportError as error:
            raise InputError(
                f"{self.url} needs a library that is not installed: run "
                f"pip install 'salt_jax[{_EXTRAS[scheme]}]'."
            ) from error
        except Exception as error:
            raise BucketError(
                f"{self.url} cannot be read ({_reason(error)}): {_ADVICE}."
            ) from error

    def files(self) -> dict[str, RemoteFile]:
        """What it holds now, by names relative to it; empty where there is nothing.

        Raises:
          BucketError: It cannot be listed.
        """
        with self._told("read"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {
            name.removeprefix(f"{self._root}/"): RemoteFile(int(info["size"]), _version(info))
            for name, info in sorted(found.items())
            if info["type"] == "file" and name.startswith(f"{self._root}/")
        }

    def fetch(self, folder: pathlib.Path, names: Sequence[str]) -> None:
        """Copies files into a folder on the disk, each whole or not at all.

        Raises:
          BucketError: One cannot be read.
        """
        temporary = [folder / f"{name}.fetched.tmp" for name in names]
        for path in temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._told("read"):
                self._files.get([self._at(name) for name in names], list(map(str, temporary)))
            for name, path in sorted(zip(names, temporary, strict=True), key=lambda x: _rank(x[0])):
                os.replace(path, folder / name)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)

    def put(self, folder: pathlib.Path, names: Sequence[str]) -> None:
        """Copies files from a folder on the disk, those last that say that others are complete.

        Raises:
          BucketError: One cannot be written.
        """
        for rank in range(2):
            own = [name for name in names if _rank(name) == rank]
            if not own:
                continue
            with self._told("written"):
                local = [str(folder / name) for name in own]
                self._files.put(local, [self._at(name) for name in own])

    def remove(self, names: Iterable[str]) -> None:
        """Takes files away, those first that say that others are complete.

        Raises:
          BucketError: One cannot be removed.
        """
        for name in sorted(names, key=_rank, reverse=True):
            with self._told("written"), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))

    def copy_below(self, kind: str) -> pathlib.Path:
        """Where its copy lies on this machine."""
        return _copies() / kind / pathlib.Path(*self.parts)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turns an error of a library or of the network, of whichever class, into a sentence."""
        try:
            yield
        except Exception as error:
            raise BucketError(
                f"{self.url} cannot be {what} ({_reason(error)}): {_ADVICE}."
            ) from error


class Copied(NamedTuple):
    """A file of the bucket's as it was when it and its copy were the same (None while one is being
    made the other), and the copy's time of change in nanoseconds."""

    there: RemoteFile | None
    changed_ns: int


class Copy:
    """A folder on the disk and which of its files are the bucket's.

    Args:
      folder: The bucket's.
      path: The copy.
    """

    def __init__(self, folder: RemoteFolder, path: pathlib.Path) -> None:
        self.folder, self.path = folder, path
        self._record = path.parent / f".{path.name}.copy.json"

    def known(self) -> dict[str, Copied]:
        """The files that were copied, either way, by name; empty where nothing was."""
        try:
            known = json.loads(self._record.read_text())
            return {
                str(name): Copied(there and RemoteFile(*there), int(changed_ns))
                for name, (there, changed_ns) in known.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def note(self, files: Mapping[str, Copied]) -> None:
        """Remembers them."""
        self._record.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._record, json.dumps(files, indent=0))

    def fetch(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Makes the copy what the bucket holds now.

        Args:
          wanted: Which files to have; others that were copied before are kept while they are the
            bucket's.

        Raises:
          InputError: There is no room for it.
          BucketError: It cannot be read.
        """
        there, known = self.folder.files(), self.known()
        current = {
            name: copied
            for name, copied in known.items()
            if there.get(name) == copied.there and changed_ns(self.path / name) == copied.changed_ns
        }
        for name in sorted(known.keys() - there.keys(), key=_rank, reverse=True):
            self.drop(name)
        missing = [name for name in there if wanted(name) and name not in current]
        if missing:
            total = sum(there[name].bytes for name in missing)
            self._require_space(total)
            print(
                f"Copying {len(missing)} files, {total / 1e6:,.1f} MB, from {self.folder.url} to "
                f"{self.path}",
                flush=True,
            )
            self.note(current)
            self.folder.fetch(self.path, missing)
        new = {name: Copied(there[name], changed_ns(self.path / name)) for name in missing}
        if missing or known.keys() != current.keys():
            self.note(current | new)

    def drop(self, name: str) -> None:
        """Takes a file out of the copy, and the folders that are empty without it."""
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
    """A folder on this machine's disk: the path itself, or a copy of a bucket's folder.

    Args:
      path: As it was typed.
      wanted: Which of a bucket's files to copy, by their names relative to it.

    Raises:
      InputError: The bucket's folder cannot be read, or is empty.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    folder = RemoteFolder(os.fspath(path))
    copy = Copy(folder, folder.copy_below("input"))
    copy.path.parent.mkdir(parents=True, exist_ok=True)
    with open(copy.path.parent / f".{copy.path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes on this machine one fetches
        copy.fetch(wanted)
    if not copy.path.is_dir():
        raise InputError(f"There is nothing in {folder.url}: name another folder.")
    return copy.path


def local_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """A file on this machine's disk: the path itself, or a copy of a bucket's file.

    Raises:
      InputError: The bucket's file cannot be read, or isn't there.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    folder, _, name = os.fspath(path).rpartition("/")
    file = local_folder(folder, lambda other: other == name) / name
    if not file.exists():
        raise InputError(f"There is no file {os.fspath(path)}: name another.")
    return file


def local_run(url: str, step: int | None) -> pathlib.Path:
    """A copy of a run's folder in a bucket, with one of its checkpoints.

    Args:
      url: The run's.
      step: The checkpoint's step; None is the newest.

    Raises:
      InputError: It cannot be read, is empty, or has no such checkpoint.
    """
    steps = remote_steps(RemoteFolder(url).files())
    if step is not None and step not in steps:
        raise InputError(
            f"{url} has {f'checkpoints of {_listed(steps)}' if steps else 'no checkpoint'}, and "
            f"step {step} is asked for: name another step."
        )
    kept = f"checkpoints/{step if step is not None else max(steps, default=None)}/"
    return local_folder(
        url, lambda name: not name.startswith("checkpoints/") or name.startswith(kept)
    )


def remote_steps(files: Collection[str]) -> list[int]:
    """The steps of complete checkpoints among the names of a run's files, ascending."""
    found = (re.fullmatch(r"checkpoints/(\d+)/digests\.json", name) for name in files)
    return sorted(int(match[1]) for match in found if match)


def checkpoint_of(name: str) -> str:
    """The checkpoint that a file belongs to, "RUN/checkpoints/STEP"; "" where it is of none."""
    found = re.match(r"(?:.*/)?checkpoints/\d+(?=/)", name)
    return found[0] if found else ""


def _listed(steps: Sequence[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


def changed_ns(path: pathlib.Path) -> int:
    """A file's time of change in nanoseconds; -1 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _copies() -> pathlib.Path:
    given = os.environ.get(COPIES)
    return pathlib.Path(given or "~/.cache/salt_jax").expanduser().absolute()


def _rank(name: str) -> int:
    return int(name.rpartition("/")[2] in _MARKS)


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _reason(error: Exception) -> str:
    """What went wrong, in one line, without anything that opens the bucket."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    for secret in filter(None, (os.environ.get(name) for name in _SECRETS)):
        text = text.replace(secret, "…").replace(urllib.parse.quote(secret, safe=""), "…")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
