"""SHA-256 digests of a checkpoint's files: Orbax would load an array with a flipped bit.

STEP/digests.json is written before the checkpoint's folder gets its name, and compared before
anything is loaded.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

from salt_jax.errors import InputError
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.json_files import read_json_object, require_shape
from salt_jax.storage.manifests import file_digest
from salt_jax.terminal import warn

DIGESTS_FILE = "digests.json"

# Orbax adds it after everything else.
_MARK = "commit_success.txt"

# The stores that each process writes for itself, and the manifest that merges them.
_PARTS, _MANIFEST = "ocdbt.process_", "manifest.ocdbt"


def write_digests(folder: pathlib.Path, items: Sequence[str]) -> None:
    """Writes the digests of all files of a checkpoint's items, which it reads for that.

    Raises:
      InputError: An item is incomplete.
    """
    for item in items:
        _require_whole(folder, item)
    digests = {
        str(path.relative_to(folder)): file_digest(path)
        for item in items
        for path in _files(folder / item)
        if path.name != _MARK
    }
    write_text(folder / DIGESTS_FILE, json.dumps(digests, indent=1))


def complete_digests(folder: pathlib.Path, items: Sequence[str]) -> None:
    """Writes the digests if a kill came between a checkpoint's name and its digests."""
    if not (folder / DIGESTS_FILE).exists():
        write_digests(folder, items)


def lacking(item: pathlib.Path) -> str:
    """What is missing for an item to be read, a file or the item itself; "" if nothing is."""
    names = {path.name for path in item.iterdir()} if item.is_dir() else set()
    if not names:
        return item.name
    in_parts = any(name.startswith(_PARTS) for name in names)
    return f"{item.name}/{_MANIFEST}" if in_parts and _MANIFEST not in names else ""


def check_digests(folder: pathlib.Path, items: Sequence[str]) -> None:
    """Compares files of a checkpoint, RUN/checkpoints/STEP, with their digests, if it has any.

    Raises:
      InputError: A file is missing or has changed.
    """
    for item in items:
        item_digest(folder, item)


def item_digest(folder: pathlib.Path, item: str) -> str:
    """The SHA-256 (hex) of an item's file names and contents.

    Raises:
      InputError: See `check_digests`.
    """
    known, whole, found = _known(folder), hashlib.sha256(), set()
    _require_whole(folder, item)
    for path in _files(folder / item):
        digest, name = file_digest(path), str(path.relative_to(folder))
        if known and path.name != _MARK and known.get(name) != digest:
            raise damaged(folder, f"{name} is not what was written")
        whole.update(str(path.relative_to(folder / item)).encode())
        whole.update(bytes.fromhex(digest))
        found.add(name)
    missing = sorted(name for name in known.keys() - found if name.startswith(f"{item}/"))
    if missing:
        raise damaged(folder, f"{missing[0]} is missing")
    return whole.hexdigest()


def damaged(folder: pathlib.Path, what: str) -> InputError:
    """The error of a checkpoint that can't be used, which names the older ones."""
    older = [p.name for p in folder.parent.iterdir() if p.name.isdigit() and p != folder]
    steps = ", ".join(sorted(older, key=int))
    instead = f"use another one ({steps}), deleting {folder} for a run to go on from there"
    return InputError(
        f"The checkpoint {folder} is damaged ({what}): bring back a copy of it"
        f"{f', or {instead}' if older else ''}."
    )


def _require_whole(folder: pathlib.Path, item: str) -> None:
    if missing := lacking(folder / item):
        raise damaged(folder, f"{missing} is missing")


def _known(folder: pathlib.Path) -> dict[str, str]:
    path = folder / DIGESTS_FILE
    if not path.exists():
        _tell_unchecked(folder.absolute())
        return {}
    try:
        known = read_json_object(path, "")
        require_shape(path, known, {str: str}, "")
    except InputError as error:
        raise damaged(folder, f"{DIGESTS_FILE} is not what was written") from error
    return known


@functools.cache
def _tell_unchecked(folder: pathlib.Path) -> None:
    """Warns once for each checkpoint. Not an error, since runs of older versions are resumed."""
    warn(
        f"{folder} has no {DIGESTS_FILE} (made by an older version, or half-deleted): its files "
        "are not checked."
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """An item's files; symbolic links are refused, which no checkpoint has."""
    found = sorted(folder.rglob("*"))
    if links := [path for path in (folder, *found) if path.is_symlink()]:
        raise damaged(folder.parent, f"{links[0].relative_to(folder.parent)} is a link")
    return [path for path in found if path.is_file()]
