"""Cache folders in the user's home, which in a container may be missing or read-only."""

import errno
import functools
import os
import pathlib
import tempfile

from salt_jax.errors import InputError
from salt_jax.terminal import warn


def writable(folder: str) -> pathlib.Path:
    """The folder's absolute path, with ~ expanded; made if needed. OSError if it cannot be written,
    or this user has no home folder."""
    try:
        path = pathlib.Path(folder).expanduser().absolute()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "this user has no home folder", folder) from error
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


@functools.cache
def cache_folder(name: str, setting: str) -> pathlib.Path:
    """~/.cache/NAME or, with a warning, a temporary folder if that can't be written; `setting` is
    the environment variable that overrides it. InputError if the temporary folder is another
    user's."""
    home = f"~/.cache/{name}"
    try:
        return writable(home)
    except OSError as error:
        reason = error.strerror
    own = pathlib.Path(tempfile.gettempdir()) / f"salt_jax-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise InputError(f"{own} is another user's: set {setting} to a folder of your own.")
    folder = own / name
    folder.mkdir(exist_ok=True)
    warn(
        f"{home} cannot be written ({reason}): {folder} is used; set {setting} to a folder that "
        "lasts."
    )
    return folder
