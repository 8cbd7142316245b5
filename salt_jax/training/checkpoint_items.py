"""Orbax's handlers of a checkpoint's items, made to work with any characters in the folder's path.

Every item is opened again before the checkpoint is complete.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.buckets import as_bucket_errors, is_remote
from salt_jax.training.checkpoint_digests import damaged, lacking

ARRAYS, PROGRESS = ("params", "optimizer"), "progress"
ITEMS = (*ARRAYS, PROGRESS)

# Orbax globs the whole path, without **; TensorStore takes a backslash for a slash.
_NOT_IN_PATHS = ("**", "\\")
_NOT_IN_URLS = ("*", "?", "[", "]", "\\")

_UNREADABLE = (OSError, ValueError, KeyError)


def require_path(run_path: pathlib.Path) -> None:
    """Refuses a run's folder in which no checkpoint could be written, or read back.

    Raises:
      InputError: With the characters in its path.
    """
    path = os.fspath(run_path) if is_remote(run_path) else str(run_path.absolute())
    signs = _NOT_IN_URLS if is_remote(run_path) else _NOT_IN_PATHS
    if sign := next((sign for sign in signs if sign in path), ""):
        raise InputError(
            f"{path} has {sign} in its path, which the checkpoint libraries misread: choose a "
            "folder without it."
        )


def item_handlers(
    written: Callable[[str, pathlib.Path], None],
) -> ocp.handlers.CheckpointHandlerRegistry:
    """The handlers that write and read each of ITEMS.

    Args:
      written: Called in every process, in the background, with the item and its folder once the
        process has written its part of an item of arrays.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ARRAYS:
        handler = _ArraysHandler(functools.partial(written, item))
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    progress = ocp.JsonCheckpointHandler()
    registry.add(PROGRESS, ocp.args.JsonSave, progress)
    registry.add(PROGRESS, ocp.args.JsonRestore, progress)
    return registry


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Arrays, which are opened again before the checkpoint is complete."""

    def __init__(self, written: Callable[[pathlib.Path], None]) -> None:
        super().__init__()
        self._written = written

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Starts writing; returns the futures to wait for in the background."""
        futures = await super().async_save(directory, *args, **kwargs) or []
        folder = _plain(getattr(directory, "path", directory))
        return [ocp.future.ChainedFuture(futures, lambda: self._written(folder))]

    def finalize(self, directory: Any) -> None:
        """Merges the stores of all processes, and reads the result back."""
        # Orbax finds the stores by directory.glob. Its own paths treat [, ], * and ? in a folder's
        # name as patterns, and find nothing or another run's files; pathlib's don't.
        super().finalize(_plain(directory))
        read_back(_plain(directory))


def _plain(directory: Any) -> pathlib.Path:
    """An Orbax path as one of pathlib's; in a bucket, where there are none, as it is."""
    return directory if is_remote(directory) else pathlib.Path(directory)


def read_back(item: pathlib.Path) -> None:
    """Opens every array in the folder of an item.

    Raises:
      RunFailed: One is missing.
    """
    reason = f"{missing} is missing" if (missing := lacking(item)) else ""
    try:
        if not reason:
            ocp.StandardCheckpointHandler().metadata(epath.Path(item))
    except _UNREADABLE as error:
        reason = _first_line(error)
    if reason:
        raise RunFailed(
            f"What was written to {item} cannot be read back ({reason}): the checkpoint is "
            "discarded and older ones are kept; choose an --output_dir on another disk."
        )


@contextlib.contextmanager
def reading(checkpoint: pathlib.Path) -> Iterator[None]:
    """Turns a library's error about an unreadable checkpoint, or a bucket's, into an InputError."""
    try:
        with as_bucket_errors(checkpoint, "read"):
            yield
    except InputError:
        raise
    except _UNREADABLE as error:
        raise damaged(checkpoint, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    """An error's first line without TensorStore's settings."""
    return str(error).partition("\n")[0].partition(" [tensorstore")[0].rstrip(".")
