"""Expands patterns to the files they match, on disk or in a bucket, each file once.

Patterns are the shell's, with ** for any folders. Links are followed, but each folder is entered
once, so that a link cycle gives no duplicates. A pattern that is a file's name, brackets included,
matches that file alone.
"""

import fnmatch
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from salt_jax.storage.buckets import is_remote, matching


def names_of(pattern: str, left_out: dict[str, str]) -> list[str]:
    """The names of the files that a pattern, a path or a bucket's URL, matches; adds to `left_out`
    the links to folders that were entered by another name, with that name."""
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
    """Each file once, with its real path. Of a file's several names one that is not a link is kept;
    the others are added to `left_out` with the name kept."""
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
    """Files with their real paths; buckets have no links."""
    folder = functools.cache(os.path.realpath)
    paths = {}
    for file in files:
        if is_remote(file):
            paths[file] = str(file)
        elif file.is_symlink():
            paths[file] = os.path.realpath(file)
        else:
            paths[file] = os.path.join(folder(file.parent), file.name)
    return paths


def _below(folder: str, parts: list[str], left_out: dict[str, str]) -> Iterator[str]:
    """The files below a folder that the parts of a pattern match."""
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
    """A folder and those below it, each once; links last, so that a folder's own name is used."""
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
    """The names in a folder, sorted; those that begin with a dot only if `hidden`."""
    try:
        return sorted(n for n in os.listdir(folder or ".") if hidden or not n.startswith("."))
    except OSError:  # as glob does
        return []
