"""Orbax's handlers of a checkpoint's items, made to work with any characters in the folder's path.

Every item is opened again before the checkpoint is complete.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.buckets import as_bucket_errors, is_remote
from salt_jax.training.checkpoint_digests import damaged, lacking

ARRAYS, PROGRESS = ("params", "optimizer"), "progress"
ITEMS = (*ARRAYS, PROGRESS)

# Orbax globs the whole path, without **; TensorStore takes a backslash for a slash.
_NOT_IN_PATHS = ("**", "\\")
_NOT_IN_URLS = ("*", "?", "[", "]", "\\")

_BROADCAST_BYTES = 1 << 30  # on a device at once

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

    def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        """See `restore_arrays`."""
        return restore_arrays(directory, args.item)


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


def restore_arrays(item: pathlib.Path, abstract: Any) -> Any:
    """The arrays in the folder of an item, each sharded as its leaf of `abstract`.

    Of replicas in different processes the first alone reads them, and sends them to the others.
    """
    axis = _replica_axis(jax.tree.leaves(abstract))
    if axis is None:
        # Without Orbax's Checkpointer, which wants its mark in gs://: a copied run has none.
        with contextlib.closing(ocp.StandardCheckpointHandler()) as plain:
            return plain.restore(item, args=ocp.args.StandardRestore(abstract))
    from_one = type_handlers.SingleReplicaArrayHandler(
        replica_axis_index=axis, broadcast_memory_limit_bytes=_BROADCAST_BYTES
    )
    registry = type_handlers.create_type_handler_registry((jax.Array, from_one))
    how = jax.tree.map(
        lambda leaf: type_handlers.SingleReplicaArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        ),
        abstract,
    )
    with contextlib.closing(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as handler:
        return handler.restore(item, args=ocp.args.PyTreeRestore(abstract, restore_args=how))


def _replica_axis(leaves: Sequence[Any]) -> int | None:
    """The first axis of the mesh along which the leaves are copied from process to process."""
    mesh = leaves[0].sharding.mesh
    split = {name for leaf in leaves for name in jax.tree.leaves(tuple(leaf.sharding.spec))}
    for axis, (name, size) in enumerate(mesh.shape.items()):
        devices_RxN = np.moveaxis(mesh.devices, axis, 0).reshape(size, -1)
        replicas = [{device.process_index for device in devices_N} for devices_N in devices_RxN]
        apart = sum(map(len, replicas)) == len(set.union(*replicas))
        if size > 1 and apart and name not in split:
            return axis
    return None


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
