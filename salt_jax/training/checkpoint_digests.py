"""SHA-256 digests of a checkpoint's files: Orbax would load an array with a flipped bit.

STEP/digests.json is written before the checkpoint's folder is renamed to STEP, and checked before
anything is loaded. With P processes, each one digests the files that it wrote, and checks every
P-th file before loading. In a bucket STEP/versions.json has the versions of the objects that were
digested; those that still have them are not read again.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from salt_jax.errors import InputError
from salt_jax.runtime.processes import raise_together
from salt_jax.storage.buckets import BucketError, RemoteFolder, as_bucket_errors, is_remote
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.json_files import read_json_object, require_shape
from salt_jax.storage.manifests import DIGESTS_FILE, file_digest
from salt_jax.terminal import warn

# Orbax writes it last.
COMMIT_MARK = "commit_success.txt"
_METADATA = "_CHECKPOINT_METADATA"  # its first

VERSIONS_FILE = "versions.json"

# The stores that each process writes for itself, and the manifest that merges them.
_PARTS, _MANIFEST = "ocdbt.process_", "manifest.ocdbt"


def write_digests(
    folder: pathlib.Path,
    items: Sequence[str],
    known: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Writes the digests of all files of a checkpoint's items; reads the files not yet digested.

    Raises:
      InputError: An item is incomplete.
    """
    for item in items:
        _require_whole(folder, item)
    names = [str(path.relative_to(folder)) for item in items for path in _files(folder / item)]
    digests = {
        name: known.get(name) or file_digest(folder / name)
        for name in names
        if pathlib.PurePath(name).name != COMMIT_MARK
    }
    if is_remote(folder):
        there = RemoteFolder(os.fspath(folder)).files()
        versions = {name: there[name].version for name in digests}
        write_text(folder / VERSIONS_FILE, json.dumps(versions, indent=1))
    write_text(folder / DIGESTS_FILE, json.dumps(digests, indent=1))


def own_digests(folder: pathlib.Path, item: str, process: int) -> dict[str, str]:
    """The digests of the files that a process wrote for an item, by their final names."""
    written = _files(folder / f"{_PARTS}{process}")
    return {f"{item}/{path.relative_to(folder)}": file_digest(path) for path in written}


def complete_digests(folder: pathlib.Path, items: Sequence[str]) -> None:
    """Writes the digests if a kill came between renaming the checkpoint and writing them."""
    if not (folder / DIGESTS_FILE).exists():
        write_digests(folder, items)


def lacking(item: pathlib.Path) -> str:
    """What is missing for an item to be read, a file or the item itself; "" if nothing is."""
    with as_bucket_errors(item, "read"):
        names = {path.name for path in item.iterdir()} if item.is_dir() else set()
    if not names:
        return item.name
    in_parts = any(name.startswith(_PARTS) for name in names)
    return f"{item.name}/{_MANIFEST}" if in_parts and _MANIFEST not in names else ""


def check_together(folder: pathlib.Path, items: Sequence[str]) -> list[str]:
    """`item_digest` of items; each process checks a part of the files, and all must call it.

    Raises:
      InputError: In every process, with the first error found.
    """
    if not jax.distributed.is_initialized():
        return [item_digest(folder, item) for item in items]
    digests, sentence, own, count = [], "", jax.process_index(), jax.process_count()
    try:
        for item in items:
            digests.append(item_digest(folder, item, lambda number: number % count == own))
    except InputError as error:
        sentence = str(error)
    raise_together(sentence)
    return digests


def item_digest(
    folder: pathlib.Path, item: str, checked: Callable[[int], bool] = lambda number: True
) -> str:
    """The SHA-256 (hex) of an item's file names and contents, in a checkpoint RUN/checkpoints/STEP.

    Its files are compared with their digests, if it has any. Those whose number is not `checked`
    have the digests of digests.json and are not read.

    Raises:
      InputError: A file is missing or has changed.
    """
    known, sealed, whole, found = _known(folder), _sealed(folder), hashlib.sha256(), set()
    _require_whole(folder, item)
    for number, (path, version) in enumerate(_files(folder / item).items()):
        name = str(path.relative_to(folder))
        digest = known.get(name, "")
        is_same = version and sealed.get(name) == version
        if not digest or (checked(number) and not is_same):
            with as_bucket_errors(path, "read"):
                digest = file_digest(path)
        if known and path.name != COMMIT_MARK and known.get(name) != digest:
            raise damaged(folder, f"{name} is not what was written")
        whole.update(str(path.relative_to(folder / item)).encode())
        whole.update(bytes.fromhex(digest))
        found.add(name)
    missing = sorted(name for name in known.keys() - found if name.startswith(f"{item}/"))
    if missing:
        raise damaged(folder, f"{missing[0]} is missing")
    return whole.hexdigest()


def is_committed(folder: pathlib.Path) -> bool:
    """Whether all of a checkpoint has been written. On disk the folder of one begun by
    `CheckpointConfig.commit_by_file` has its name, too; older versions wrote no mark there."""
    if is_remote(folder) or (folder / COMMIT_MARK).exists():
        return (folder / COMMIT_MARK).exists()
    has = {path.name for path in folder.iterdir()}
    if DIGESTS_FILE in has or _METADATA not in has:
        return bool(has)
    with contextlib.suppress(ValueError):  # half-written
        written = json.loads((folder / _METADATA).read_bytes())
        return written.get("commit_timestamp_nsecs") is not None
    return False


def is_whole(folder: pathlib.Path) -> bool:
    """Whether a checkpoint has digests and all files that they name, or digests that can't be
    read."""
    try:
        there = {str(path.relative_to(folder)) for path in _files(folder)}
        return DIGESTS_FILE in there and _known(folder).keys() <= there
    except BucketError:
        raise
    except InputError:
        return True


def damaged(folder: pathlib.Path, what: str) -> InputError:
    """The error for a checkpoint that can't be used, which names the older ones."""
    with as_bucket_errors(folder, "read"):
        older = [p.name for p in folder.parent.iterdir() if p.name.isdigit() and p != folder]
    steps = ", ".join(sorted(older, key=int))
    instead = f"use another one ({steps}): to resume a run from there, delete {folder}"
    return InputError(
        f"The checkpoint {folder} is damaged ({what}): restore a copy of it"
        f"{f', or {instead}' if older else ''}."
    )


def _require_whole(folder: pathlib.Path, item: str) -> None:
    if missing := lacking(folder / item):
        raise damaged(folder, f"{missing} is missing")


def _known(folder: pathlib.Path) -> dict[str, str]:
    path = folder / DIGESTS_FILE
    with as_bucket_errors(path, "read"):
        exists = path.exists()
    if not exists:
        _warn_unchecked(folder.absolute())
        return {}
    try:
        known = read_json_object(path, "")
        require_shape(path, known, {str: str}, "")
    except BucketError:
        raise
    except InputError as error:
        raise damaged(folder, f"{DIGESTS_FILE} is not what was written") from error
    return known


def _sealed(folder: pathlib.Path) -> dict[str, Any]:
    """The versions that objects of a bucket had when they were digested; empty if unknown."""
    path = folder / VERSIONS_FILE
    with as_bucket_errors(path, "read"):
        if not is_remote(path) or not path.exists():
            return {}
    return read_json_object(path, "delete it")


@functools.cache
def _warn_unchecked(folder: pathlib.Path) -> None:
    """Warns once for each checkpoint; not an error, so that runs of older versions can resume."""
    warn(
        f"{folder} has no {DIGESTS_FILE} (made by an older version, or half-deleted): its files "
        "are not checked."
    )


def _files(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """An item's files and, in a bucket, their versions. Symbolic links are refused: Orbax writes
    none."""
    if is_remote(folder):
        there = RemoteFolder(os.fspath(folder)).files()
        return {folder / name: file.version for name, file in there.items()}
    found = sorted(folder.rglob("*"))
    if links := [path for path in (folder, *found) if path.is_symlink()]:
        raise damaged(folder.parent, f"{links[0].relative_to(folder.parent)} is a link")
    return {path: "" for path in found if path.is_file()}
