"""Checkpoints written and read in pieces, for models that don't fit in memory.

`save_streamed` writes a checkpoint without an optimizer, otherwise like a run's; `open_parameters`
opens the parameters of any checkpoint without reading them. Both are an Orbax type handler that
writes an array chunk by chunk as its values are computed, and reads rows on demand.
"""

import contextlib
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util
from orbax.checkpoint import type_handlers

from salt_jax.huggingface.tensors import Array, Path
from salt_jax.storage.run_folder import CHECKPOINTS_FOLDER
from salt_jax.training.checkpoint_digests import item_digest, write_digests
from salt_jax.training.checkpoint_items import read_back, reading
from salt_jax.training.checkpoints import checkpoints_of

# Bytes of an array's chunk: small compared to a tensor, but only some hundreds for a model.
_CHUNK_BYTES = 4 << 20


class StreamedParameter(Protocol):
    """A parameter whose values are computed on demand; its first axis is layers or ids."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, rows: slice = slice(None)) -> Array:
        """A slice of the first axis, or all of it."""


def save_streamed(
    run_path: pathlib.Path,
    step: int,
    parameters: Mapping[Path, StreamedParameter],
    progress: Mapping[str, Any],
) -> str:
    """Writes a checkpoint atomically, from its parameters by path in the tree.

    `progress` has at least model, vocabulary_fingerprint and counters. Returns `SavedModel.digest`.
    """
    leaves = {path: _Leaf(parameter) for path, parameter in parameters.items()}
    handler = ocp.CompositeCheckpointHandler(
        params=_TreeHandler(), progress=ocp.JsonCheckpointHandler()
    )
    folder = (run_path / CHECKPOINTS_FOLDER / str(step)).absolute()
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            folder,
            args=ocp.args.Composite(
                params=_TreeSave(traverse_util.unflatten_dict(leaves)),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
        )
    write_digests(folder, ("params", "progress"))
    return item_digest(folder, "params", checked=lambda number: False)  # just made


def open_parameters(
    run_path: pathlib.Path, step: int, paths: Iterable[Path]
) -> dict[Path, StreamedParameter]:
    """The parameters of a checkpoint by path in the tree, to be read on demand."""
    folder = checkpoints_of(run_path) / str(step)
    tree = traverse_util.unflatten_dict(dict.fromkeys(paths, 0))
    restore_args = traverse_util.unflatten_dict(
        dict.fromkeys(paths, ocp.RestoreArgs(restore_type=_Leaf))
    )
    with reading(folder), contextlib.closing(_TreeHandler()) as handler:
        opened = handler.restore(
            folder / "params", args=_TreeRestore(tree, restore_args=restore_args)
        )
    found: dict[Path, StreamedParameter] = traverse_util.flatten_dict(opened)
    return found


class _Leaf:
    """The attributes of an array that Orbax reads, without its values."""

    def __init__(self, parameter: StreamedParameter) -> None:
        self.read = parameter.read
        self.shape, self.dtype = parameter.shape, parameter.dtype
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize


class _Stored:
    """An array of a checkpoint, with a cache of the chunks read last."""

    def __init__(self, array: tensorstore.TensorStore) -> None:
        self._array = array
        chunk: Any = array.chunk_layout.read_chunk.shape
        self._rows_of_chunk = chunk[0]
        self._start, self._values = 0, np.empty(0)
        self.shape, self.dtype = array.shape, array.dtype.numpy_dtype

    def read(self, rows: slice = slice(None)) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        if not self._start <= start <= stop <= self._start + len(self._values):
            self._values = np.empty(0)  # freed before more is read
            step = self._rows_of_chunk
            self._start = start // step * step
            end = min(-(-stop // step) * step, self.shape[0])
            self._values = np.empty((end - self._start, *self.shape[1:]), self.dtype)
            for first in range(self._start, end, step):
                chunk = self._array[first : min(first + step, end)].read().result()
                self._values[first - self._start :][: len(chunk)] = chunk
        return self._values[start - self._start : stop - self._start]


class _LeafHandler(type_handlers.TypeHandler):
    """Stores each array in its own folder, as Orbax does without OCDBT."""

    def typestr(self) -> str:
        return "np.ndarray"  # what the checkpoint's metadata says

    async def serialize(
        self,
        values: Sequence[_Leaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        writing = _write_all(values, infos)  # which Orbax starts once the folder exists
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="streamed")]

    async def deserialize(
        self,
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> Sequence[_Stored]:
        return [_Stored(await _open(info)) for info in infos]

    async def metadata(self, infos: Sequence[type_handlers.ParamInfo]) -> Sequence[Any]:
        raise NotImplementedError("checkpoints are described by Orbax's own handlers")


class _TreeHandler(ocp.PyTreeCheckpointHandler):
    def __init__(self) -> None:
        registry = type_handlers.create_type_handler_registry(
            (_Leaf, _LeafHandler()),
            (jax.Array, type_handlers.ArrayHandler()),  # without which Orbax warns
        )
        super().__init__(use_ocdbt=False, type_handler_registry=registry)

    def finalize(self, directory: Any) -> None:
        """Reads back what was written; there are no OCDBT stores to merge."""
        read_back(pathlib.Path(directory))


@ocp.args.register_with_handler(_TreeHandler, for_save=True)
class _TreeSave(ocp.args.PyTreeSave):
    """Selects the handler in Orbax."""


@ocp.args.register_with_handler(_TreeHandler, for_restore=True)
class _TreeRestore(ocp.args.PyTreeRestore):
    """Selects the handler in Orbax."""


async def _write_all(values: Sequence[_Leaf], infos: Sequence[type_handlers.ParamInfo]) -> None:
    for value, info in zip(values, infos, strict=True):
        await info.await_path_creation()
        try:
            await _write(value, info)
        except ValueError as error:  # tensorstore's, also for a full disk
            if not (code := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(info.path)) from error


async def _write(leaf: _Leaf, info: type_handlers.ParamInfo) -> None:
    chunk = _chunk_shape(leaf.shape, _CHUNK_BYTES // leaf.dtype.itemsize)
    array = await tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{info.path}/"},
            # No fill value, so that chunks of zeros are written: Orbax treats missing ones as lost.
            "metadata": {"compressor": None},
        },
        create=True,
        dtype=leaf.dtype.name,
        shape=leaf.shape,
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=chunk),
        context=info.ts_context,
    )
    for (rows,) in _blocks(leaf.shape[:1], chunk[:1]):
        values = leaf.read(rows)
        for block in _blocks(leaf.shape[1:], chunk[1:]):
            await array[(rows, *block)].write(values[(slice(None), *block)])
        del values  # before the next ones are computed


async def _open(info: type_handlers.ParamInfo) -> tensorstore.TensorStore:
    spec = type_handlers.get_json_tspec_read(info, use_ocdbt=bool(info.is_ocdbt_checkpoint))
    return await tensorstore.open(spec, open=True, read=True, context=info.ts_context)


def _chunk_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """A chunk of at most `size` values that are contiguous in memory."""
    chunk = []
    for axis, length in enumerate(shape):
        inner = math.prod(shape[axis + 1 :])
        chunk.append(max(1, min(length, size // inner)))
        size = max(1, size // chunk[-1])
    return tuple(chunk)


def _blocks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    steps = (
        [slice(start, min(start + step, length)) for start in range(0, length, step)]
        for length, step in zip(shape, chunk, strict=True)
    )
    return itertools.product(*steps)
