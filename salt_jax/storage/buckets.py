"""Folders and files in buckets, gs://BUCKET/PATH and s3://BUCKET/PATH, through fsspec.

gcsfs and s3fs find credentials as Google's and Amazon's own tools do; this package never sees them.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

from salt_jax.errors import InputError
from salt_jax.storage.json_files import require_inside
from salt_jax.storage.manifests import COMPLETED_FILE, DIGESTS_FILE

# Scheme → the extra that installs its library.
_EXTRAS = {"gs": "gcs", "s3": "s3"}
# fsspec's file info fields that change with a file's content, best first.
_VERSIONS = ("generation", "ETag", "etag", "md5Hash", "created", "mtime", "LastModified")
# Concurrent transfers; fsspec's default can be hundreds, at 50 MB or more of memory each.
_FILES_AT_ONCE, _RANGES_AT_ONCE = 16, 64
_PART_BYTES = 8 * 2**20
_MOST_PARTS, _PART_UNIT = 10_000, 2**18  # S3's limit for a file; the unit of GCS's part sizes
# Options for one file. s3fs survives a lost connection only if it reads a file in one part.
_PUT: dict[str, dict[str, int]] = {"gs": {}, "s3": {"max_concurrency": 2}}
_GET: dict[str, dict[str, int]] = {
    "gs": {"concurrency": 2, "chunk_size": _PART_BYTES, "max_prefetch_size": 2 * _PART_BYTES},
    "s3": {"max_concurrency": 1},
}
# A listing serves until the next one, so that what reads the files of one doesn't list again.
_LISTED = {"use_listings_cache": True}
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")

# JAX and Orbax open paths through etils, which decides once, at its first use, whether buckets are
# opened by TensorFlow, if that is installed, or by fsspec.
os.environ.setdefault("EPATH_USE_TF", "false")
# They log the traceback of errors that they also raise.
for _library in ("gcsfs", "fsspec"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)


class BucketError(InputError):
    """A bucket can't be read or written: a wrong name, missing permissions, the network."""


class RemoteFile(NamedTuple):
    """A file's size in bytes, and a version string that changes with its content."""

    bytes: int
    version: str


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


class RemoteFolder:
    """A folder in a bucket, gs://BUCKET/PATH or s3://BUCKET/PATH.

    Raises:
      InputError: The scheme is unknown or its library not installed, or the URL names no folder or
        has credentials.
    """

    def __init__(self, url: str) -> None:
        self._root = _place(url)
        scheme, parts = url.partition("://")[0], self._root.split("/")
        if len(parts) < 2 or ".." in parts or "." in parts:
            raise InputError(f"{url} names no folder of a bucket: write {scheme}://BUCKET/FOLDER.")
        self.url = f"{scheme}://{self._root}"
        self.parts = (scheme, *parts)
        self._files, _ = _opened(url, **_LISTED)

    def files(self) -> dict[str, RemoteFile]:
        """Lists its files by relative name; InputError if a name leads out of the folder or can't
        be a file's name on disk."""
        with as_bucket_errors(self.url, "read"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        files = {
            name.removeprefix(f"{self._root}/"): RemoteFile(int(info["size"]), _version(info))
            for name, info in sorted(found.items())
            if info["type"] == "file" and name.startswith(f"{self._root}/")
        }
        # Empty objects may stand for folders.
        files = {name: file for name, file in files.items() if name and not name.endswith("/")}
        for name in files:
            require_inside(self.url, name, "rename or remove that object")
        _require_files(self.url, files)
        return files

    def fetch(self, folder: pathlib.Path, names: Sequence[str]) -> None:
        """Downloads files into a folder, each atomically."""
        temporary = {name: folder / f"{name}.fetched.tmp" for name in names}
        for path in temporary.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with as_bucket_errors(self.url, "read"):
                local = list(map(str, temporary.values()))
                there = [self._at(name) for name in names]
                self._files.get(there, local, batch_size=_FILES_AT_ONCE, **_GET[self.parts[0]])
            for name in sorted(names, key=completes):
                os.replace(temporary[name], folder / name)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of files, each a name, its first byte and the one after its last, read at once."""
        names, starts, ends = zip(*wanted, strict=True)
        with as_bucket_errors(self.url, "read"):
            parts = self._files.cat_ranges(
                list(map(self._at, names)), starts, ends, batch_size=_RANGES_AT_ONCE
            )
            for part in parts:
                if isinstance(part, Exception):
                    raise part
        for (name, start, end), part in zip(wanted, parts, strict=True):
            if len(part) != end - start:
                raise BucketError(
                    f"{self.url}/{name} is shorter than it was: copy it there again, and run this "
                    "command again."
                )
        return list(parts)

    def put(self, folder: pathlib.Path, names: Sequence[str]) -> None:
        """Uploads files of a folder, those that mark others as complete last."""
        for _, group in itertools.groupby(sorted(names, key=completes), key=completes):
            own = list(group)
            with as_bucket_errors(self.url, "written"):
                local = [str(folder / name) for name in own]
                self._files.put(
                    local,
                    [self._at(name) for name in own],
                    batch_size=_FILES_AT_ONCE,
                    chunksize=_part_bytes(max(map(os.path.getsize, local))),
                    **_PUT[self.parts[0]],
                )

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, those that mark others as complete first."""
        for name in sorted(names, key=completes, reverse=True):
            with as_bucket_errors(self.url, "written"), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def path_of(file: str) -> pathlib.Path:
    """A path on disk or in a bucket, for `open_file` and `state_of`; InputError for gs:/BUCKET."""
    if not is_remote(file):
        if file.startswith(tuple(f"{scheme}:/" for scheme in _EXTRAS)):
            scheme, _, rest = file.partition(":/")
            raise InputError(f"{file} is neither a URL nor a folder: write {scheme}://{rest}.")
        return pathlib.Path(file)
    from etils import epath

    _opened(file)
    return cast(pathlib.Path, epath.Path(file))


def change_if(url: str, generation: str, content: bytes | None) -> str:
    """Writes a gs:// object (None: removes it) if it still has this generation, "0" for no object.

    Returns:
      Its new generation; "" if it had another one.

    Raises:
      BucketError: It cannot be written.
    """
    files, place = _opened(url)
    bucket, _, name = place.partition("/")
    with as_bucket_errors(url, "written"):
        try:
            if content is None:
                files.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)
                return "0"
            objects = f"{files.base.replace('/storage/', '/upload/storage/', 1)}b/{{}}/o"
            written = files.call(
                *("POST", objects, bucket),
                **{"uploadType": "media", "name": name, "ifGenerationMatch": generation},
                data=content,
                json_out=True,
            )
        except (FileExistsError, FileNotFoundError):
            return ""
    return str(written["generation"])


def read_object(url: str) -> tuple[str, bytes]:
    """A gs:// object's generation and content, ("0", b"") if there is none; BucketError if it
    cannot be read."""
    files, place = _opened(url)
    with as_bucket_errors(url, "read"):
        try:
            return str(files.info(place)["generation"]), files.cat_file(place)
        except FileNotFoundError:
            return "0", b""


def matching(pattern: str) -> list[str]:
    """The URLs of a bucket's files that match a pattern; ** crosses folders. A pattern that is a
    file's name, brackets included, matches that file alone."""
    files, place = _opened(pattern, **_LISTED)
    with as_bucket_errors(pattern, "read"):
        files.invalidate_cache()
        readings = (files.glob(reading, detail=True) for reading in _readings(place))
        found: dict[str, Any] = next(filter(None, readings), {})
    found = {place: found[place]} if place in found else found
    scheme = pattern.partition("://")[0]
    return [f"{scheme}://{name}" for name, info in sorted(found.items()) if info["type"] == "file"]


def _readings(place: str) -> Iterator[str]:
    """The pattern with its brackets taken literally, then as character classes."""
    parts = ((part.replace("[", "[[]"), part) for part in place.split("/"))
    return map("/".join, itertools.product(*map(dict.fromkeys, parts)))


def open_file(path: str | os.PathLike[str]) -> tuple[BinaryIO, tuple[int, int]]:
    """Opens a file for reading (unbuffered if on disk), and returns its `state_of` at that time;
    OSError, or BucketError in a bucket, if it cannot be read."""
    if not is_remote(path):
        file = cast(BinaryIO, open(path, "rb", buffering=0))  # noqa: SIM115 (the caller's)
        status = os.fstat(file.fileno())
        return file, (status.st_size, status.st_mtime_ns)
    files, place = _opened(os.fspath(path), **_LISTED)
    with as_bucket_errors(path, "read"):
        return files.open(place, "rb"), state_of(path)


def state_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """A file's size in bytes and a number that changes with its content: its mtime in nanoseconds,
    or a hash of the bucket's version. Errors as in `open_file`."""
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    files, place = _opened(os.fspath(path), **_LISTED)
    with as_bucket_errors(path, "read"):
        info = files.info(place)
    digest = hashlib.blake2b(_version(info).encode(), digest_size=6).digest()
    return int(info["size"]), int.from_bytes(digest)


def _place(url: str) -> str:
    """A URL's path, BUCKET/FOLDER/FILE; InputError for an unknown scheme or credentials."""
    scheme, _, rest = url.partition("://")
    if scheme not in _EXTRAS:
        raise InputError(
            f"{scheme}:// is not supported: name a folder on this machine, "
            f"or one of {', '.join(f'{known}://' for known in _EXTRAS)}."
        )
    if re.search(r"[@#]|\?.*[=&]", rest):
        raise InputError(
            f"A {scheme}:// path holds '@', '#' or a query, which stand for credentials: name the "
            "bucket and the folder alone, and give credentials as gcloud and aws find them."
        )
    return "/".join(part for part in rest.split("/") if part)


def _opened(url: str, **options: Any) -> tuple[Any, str]:
    """The file system of a URL, and its path there; InputError as `_place`, or if the library is
    not installed."""
    import fsspec

    # Otherwise gcsfs queries the kind of bucket before each call, and warns if it lacks permission.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Other processes write there, and Orbax's file system has a cache of its own.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    place, scheme = _place(url), url.partition("://")[0]
    with as_bucket_errors(f"{scheme}://{place}", "read"):
        try:
            return fsspec.filesystem(scheme, **options), place
        except ImportError as error:
            raise InputError(
                f"{scheme}://{place} needs a library that is not installed: run "
                f"pip install 'salt_jax[{_EXTRAS[scheme]}]'."
            ) from error


@contextlib.contextmanager
def as_bucket_errors(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns any error of the library or the network into a BucketError, if the path is a URL."""
    try:
        yield
    except Exception as error:  # each library has classes of its own
        refused = bucket_error(path, what, error)
        if refused is None or refused is error:
            raise
        raise refused from error


def bucket_error(
    path: str | os.PathLike[str], what: str, error: BaseException
) -> BucketError | None:
    """The BucketError for an error of the library or the network; None for any other error, or if
    the path is no URL."""
    if isinstance(error, BucketError):
        return error
    own = (InputError, TypeError, AttributeError, NameError, LookupError, AssertionError)
    if not is_remote(path) or isinstance(error, own) or not isinstance(error, Exception):
        return None
    return BucketError(
        f"{os.fspath(path)} cannot be {what} ({_reason(error)}): check the name, your "
        "permissions and the network."
    )


def _require_files(url: str, files: Mapping[str, RemoteFile]) -> None:
    """Refuses names that can't coexist in one folder on disk."""
    for name in files:
        parts = name.split("/")
        folders = ("/".join(parts[:count]) for count in range(1, len(parts)))
        if "" in parts or any(folder in files for folder in folders):
            raise InputError(
                f"{url} has an object {name!r}, which can't be a file beside its others: rename or "
                "remove it."
            )


def completes(name: str) -> bool:
    """Whether a file marks others as complete, and so is sent last and removed first."""
    return name.rpartition("/")[2] in (COMPLETED_FILE, DIGESTS_FILE)


def _part_bytes(size: int) -> int:
    """The size of the parts in which a file of this size is sent."""
    units = -(-size // (_MOST_PARTS * _PART_UNIT))
    return max(_PART_BYTES, units * _PART_UNIT)


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _reason(error: Exception) -> str:
    """An error in one line, without credentials."""
    text = " ".join(str(error).split())
    secrets = {os.environ.get(name, "") for name in _SECRETS} - {""}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be another's prefix
        text = text.replace(secret, "…").replace(urllib.parse.quote(secret, safe=""), "…")
    text = text[:200].rstrip(".")  # after removing secrets, so that none is cut in half and missed
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
