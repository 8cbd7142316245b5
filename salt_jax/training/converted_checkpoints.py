"""Checkpoints written and read a part at a time, for models that are too large to hold.

In: parameters that give their values piece by piece. Out: a checkpoint that `find_model` takes as
it takes a run's, without an optimizer; and single parameters of any checkpoint.

Orbax writes what a handler of the leaf's type makes of it. The handler here asks a leaf for so much
of its first axis as a chunk of the array on disk covers, and writes that before it asks for more.
"""

import asyncio
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util
from orbax.checkpoint import type_handlers

from salt_jax.run_folder import CHECKPOINTS_FOLDER

Path = tuple[str, ...]

# Of the arrays' files. Several chunks are on their way to the disk at once.
_CHUNK_BYTES = 8 << 20


class StreamedParameter(Protocol):
    """A parameter whose values are made when they are asked for.

    Attributes:
      shape: Its shape; the first axis is that of layers, or of ids.
      dtype: Its dtype.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, rows: slice) -> np.ndarray[Any, Any]:
        """Some of the first axis."""


class _Leaf:
    """What Orbax asks of an array, but for the array."""

    def __init__(self, parameter: StreamedParameter) -> None:
        self.read = parameter.read
        self.shape, self.dtype = parameter.shape, parameter.dtype
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        self.nbytes = self.size * self.dtype.itemsize


class _LeafHandler(type_handlers.NumpyHandler):
    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()

    async def _open_and_write(
        self, value: _Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        async with self._turn:  # Orbax would write all leaves at once
            spec = tensorstore.Spec(tspec)
            array = await tensorstore.open(spec, create=True, open=True, context=ts_context)
            steps: Any = array.chunk_layout.write_chunk.shape
            blocks = (
                [slice(start, min(start + step, size)) for start in range(0, size, step)]
                for size, step in zip(array.shape, steps, strict=True)
            )
            rows, values = slice(0, 0), np.empty(0)
            for block in itertools.product(*blocks):
                if block[0] != rows:
                    rows, values = block[0], np.empty(0)  # let go before there is more
                    values = value.read(rows)
                await array[block].write(values[(slice(None), *block[1:])])


def save_streamed(
    run_path: pathlib.Path,
    step: int,
    parameters: Mapping[Path, StreamedParameter],
    progress: Mapping[str, Any],
) -> None:
    """Writes a checkpoint of parameters alone; it appears under its name when all of it is there.

    Args:
      run_path: The run's folder.
      step: The checkpoint's step, which must not be there yet.
      parameters: Every parameter by its path in the tree.
      progress: What `checkpoints.read_progress` is to give: model, vocabulary_fingerprint and
        counters at least.
    """
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()), (_Leaf, _LeafHandler())
    )
    tree = traverse_util.unflatten_dict({path: _Leaf(leaf) for path, leaf in parameters.items()})
    save_args = jax.tree.map(_chunks, tree)
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        progress=ocp.JsonCheckpointHandler(),
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            (run_path / CHECKPOINTS_FOLDER / str(step)).absolute(),
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(tree, save_args=save_args),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
        )


def _chunks(leaf: _Leaf) -> ocp.SaveArgs:
    if leaf.nbytes <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    # A kernel's chunk is of one layer; a table's, of some rows, which its longer axis is.
    axes = (0,) if leaf.ndim > 2 else ()
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)


def read_parameter(
    run_path: pathlib.Path, step: int, path: Path, shape: tuple[int, ...], dtype: Any
) -> np.ndarray[Any, Any]:
    """One parameter of a checkpoint, whole.

    Args:
      run_path: The run's folder.
      step: The checkpoint's step.
      path: The parameter's, in the tree.
      shape: Its shape.
      dtype: What to give it in.
    """
    folder = run_path / CHECKPOINTS_FOLDER / str(step) / "params"
    tree = traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype)})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            folder.absolute(),
            args=ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True),
        )
    array: np.ndarray[Any, Any] = traverse_util.flatten_dict(restored)[path]
    return array
