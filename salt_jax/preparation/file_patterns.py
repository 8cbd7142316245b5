"""The files that patterns name, on the disk or in a bucket, and each of them once.

In: patterns as the shell has them, ** for all folders below. Out: names, and which of them lead to
one file: a link into its own folder would have a file read forty times.

A sign may be part of a name: a pattern that is a file's name means that file alone, and brackets
that are in a name stand for themselves.
"""

import fnmatch
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from salt_jax.storage.buckets import is_remote, matching


def names_of(pattern: str, left_out: dict[str, str]) -> list[str]:
    """The names that a pattern finds, of files alone.

    Args:
      pattern: On the disk, or a bucket's URL.
      left_out: Gets the links to folders that are gone through already, and their names there.
    """
    if is_remote(pattern):
        return matching(pattern)
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return [path]
    if path.endswith("/"):
        return []
    parts = [part for part in path.split("/") if part]
    return list(_below("/" if path.startswith("/") else "", parts, left_out))


def once(files: Iterable[pathlib.Path], left_out: dict[str, str]) -> dict[pathlib.Path, str]:
    """Files with their real paths, by which they are told apart: each once.

    Args:
      files: By whatever names. Of several of one file that is kept which is no link.
      left_out: Gets the other names, and what is kept in their place.
    """
    names: dict[str, list[pathlib.Path]] = {}
    for file, real in real_paths(files).items():
        names.setdefault(real, []).append(file)
    kept: dict[pathlib.Path, str] = {}
    for real, same in names.items():
        first = min(same, key=lambda file: (os.path.islink(file), str(file) != real, file))
        kept[first] = real
        left_out |= {str(file): str(first) for file in same if file != first}
    return kept


def real_paths(files: Iterable[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Files with their real paths; in a bucket there are no links."""
    folders: dict[pathlib.Path, str] = {}

    def real(file: pathlib.Path) -> str:
        if is_remote(file):
            return str(file)
        if file.is_symlink():
            return os.path.realpath(file)
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        return os.path.join(folders[file.parent], file.name)

    return {file: real(file) for file in files}


def _below(folder: str, parts: list[str], left_out: dict[str, str]) -> Iterator[str]:
    """The files of a folder that the parts of a pattern find."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for inner in _folders(folder, left_out):
            yield from _below(inner, rest or ["*"], left_out)
        return
    path = os.path.join(folder, part)
    if not re.search(r"[*?[]", part) or ("[" in part and os.path.lexists(path)):
        paths = [path]
    else:
        names = fnmatch.filter(_visible(folder, part.startswith(".")), part)
        paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if rest and os.path.isdir(path):
            yield from _below(path, rest, left_out)
        elif not rest and os.path.isfile(path):
            yield path


def _folders(folder: str, left_out: dict[str, str]) -> Iterator[str]:
    """A folder and those below, each once by its real path; links last, so that what is no link
    goes by its own name."""
    seen: dict[str, str] = {}
    links = [folder]
    for link in links:  # which grows
        inside = [(link, os.path.realpath(link))]
        while inside:
            here, real = inside.pop()
            if real in seen:
                left_out[here] = seen[real]
                continue
            seen[real] = here
            yield here
            for name in _visible(here):
                path = os.path.join(here, name)
                if os.path.isdir(path):
                    if os.path.islink(path):
                        links.append(path)
                    else:
                        inside.append((path, os.path.join(real, name)))


def _visible(folder: str, hidden: bool = False) -> list[str]:
    """What is in a folder, sorted, with names that begin with a dot or without."""
    try:
        return sorted(n for n in os.listdir(folder or ".") if hidden or not n.startswith("."))
    except OSError:  # as glob has it
        return []
