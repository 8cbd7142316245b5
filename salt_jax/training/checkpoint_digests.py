"""Digests of a checkpoint's files: Orbax would load an array of which a byte was flipped.

In: a checkpoint's folder, STEP/{params,optimizer,progress}. Out: STEP/digests.json, written before
the folder gets its name; and a sentence about the first file that is not what it was, or about
there being none to check.
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

# Orbax adds it when all else is there.
_MARK = "commit_success.txt"

# What the processes of a run write each for itself, and what makes arrays of it.
_PARTS, _MANIFEST = "ocdbt.process_", "manifest.ocdbt"


def write_digests(folder: pathlib.Path, items: Sequence[str]) -> None:
    """Notes the SHA-256 of every file of a checkpoint's items, all of which it reads.

    Raises:
      InputError: An item is not whole.
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
    """Writes them where a kill came between a checkpoint's name and its digests."""
    if not (folder / DIGESTS_FILE).exists():
        write_digests(folder, items)


def lacking(item: pathlib.Path) -> str:
    """What an item's folder needs to be read and has not, a file or itself; "" where it has all."""
    names = {path.name for path in item.iterdir()} if item.is_dir() else set()
    if not names:
        return item.name
    in_parts = any(name.startswith(_PARTS) for name in names)
    return f"{item.name}/{_MANIFEST}" if in_parts and _MANIFEST not in names else ""


def check_digests(folder: pathlib.Path, items: Sequence[str]) -> None:
    """Compares the files of a checkpoint's items with their digests; says so if it has none.

    Args:
      folder: RUN/checkpoints/STEP.
      items: Which of its items.

    Raises:
      InputError: A file is missing, or is another one than was written.
    """
    for item in items:
        item_digest(folder, item)


def item_digest(folder: pathlib.Path, item: str) -> str:
    """The SHA-256 of all of an item's names and files.

    Raises:
      InputError: As `check_digests`.
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
    """The error of a checkpoint that can't be used, with the way to an older one."""
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
    """Once for each checkpoint. No error: runs of older versions are to go on."""
    warn(
        f"{folder} has no {DIGESTS_FILE} (made by an older version, or half-deleted): its files "
        "are not checked."
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """An item's files; those that a link of someone else's puts there are none of a checkpoint."""
    found = sorted(folder.rglob("*"))
    if links := [path for path in (folder, *found) if path.is_symlink()]:
        raise damaged(folder.parent, f"{links[0].relative_to(folder.parent)} is a link")
    return [path for path in found if path.is_file()]
