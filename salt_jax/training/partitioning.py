"""Where arrays live: a mesh of devices, and rules from logical axis names to mesh axes.

In: a mesh shape and the logical axis names that the model puts on its parameters. Out:
NamedShardings for parameters, optimizer state and batches, which is all that jax.jit needs to
partition a program.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from salt_jax.distill.head_sharding import HeadSharding
from salt_jax.errors import InputError

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

MESH_AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

DEFAULT_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("length", None),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh: how many devices along each axis.

    Attributes:
      slice: TPU slices (or nodes) joined by the slow network; the batch is split over them.
      data: Devices that hold whole copies of the parameters and split the batch.
      fsdp: Devices that split the batch, the parameters and the optimizer state.
      tensor: Devices that split heads, hidden units and the vocabulary.
      One axis may be -1: all the devices that the others leave.
    """

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes()
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise InputError(
                f"MeshConfig got {dict(zip(MESH_AXES, sizes, strict=True))}: every axis must be at "
                "least 1, and at most one of them -1."
            )

    def sizes(self) -> tuple[int, ...]:
        """Devices along slice, data, fsdp and tensor."""
        return (self.slice, self.data, self.fsdp, self.tensor)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Lays the mesh over `devices`, all of this run's by default.

        Raises:
          InputError: The axes don't multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        fixed = math.prod(size for size in self.sizes() if size != -1)
        sizes = [len(devices) // fixed if size == -1 else size for size in self.sizes()]
        if math.prod(sizes) != len(devices):
            raise InputError(
                f"MeshConfig's axes {dict(zip(MESH_AXES, self.sizes(), strict=True))} need "
                f"{math.prod(sizes) or fixed} devices and there are {len(devices)}: change its "
                "slice, data, fsdp or tensor."
            )
        grid = np.asarray(devices, dtype=object).reshape(sizes)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """The context in which programs are traced: activations are constrained by `rules`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def param_shardings(boxed_params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for every parameter, from the logical axis names in its box.

    A mesh axis that doesn't divide the dimension it is meant for is left out there: that parameter
    is replicated along it.
    """

    def one(box: Any) -> NamedSharding:
        names = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * box.ndim
        shape = nn.unbox(box).shape
        spec = nn.logical_to_mesh_axes(names, rules)
        return NamedSharding(mesh, _divisible(spec or PartitionSpec(), shape, mesh))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(one, boxed_params, is_leaf=is_box)


def optimizer_shardings(opt_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: each slot lies as the parameter it belongs to.

    Args:
      opt_state: The abstract optimizer state; the path of a slot ends in its parameter's path.
      params: Abstract parameters.
      shardings: Their shardings.
      mesh: The mesh.

    Returns:
      A tree like opt_state. A factored slot (Adafactor's, one dimension less) keeps the axes of the
      dimensions it has; anything else, such as a counter, is replicated.
    """
    by_path = {
        _path(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path: Any, slot: Any) -> NamedSharding:
        names = _path(path)
        owner = next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), None)
        return NamedSharding(mesh, _slot_spec(slot.shape, owner))

    return jax.tree_util.tree_map_with_path(one, opt_state)


def head_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> HeadSharding | None:
    """How the loss lays tokens and heads over the mesh; None on one device."""
    if mesh.size == 1:
        return None

    def axes(name: str) -> tuple[str, ...]:
        (found,) = nn.logical_to_mesh_axes((name,), rules) or (None,)
        return found if isinstance(found, tuple) else () if found is None else (found,)

    batch = axes("batch")
    # An axis that splits the tokens can't split the same tokens' logits too.
    vocab = tuple(axis for axis in axes("activation_vocab") if axis not in batch)
    embed = tuple(axis for axis in axes("embed") if axis in batch)
    return HeadSharding(mesh, batch, vocab, embed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over every axis but tensor, along their first dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_divisor(mesh: Mesh) -> int:
    """A batch must be a multiple of this many rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process's devices hold: (its number from 0 on, all parts).

    Processes that hold the same rows, since the tensor axis crosses them, have the same part.

    Raises:
      InputError: The devices of this process hold rows from places that are not one part.
    """
    places = np.arange(batch_divisor(mesh))
    held = batch_sharding(mesh).addressable_devices_indices_map(places.shape).values()
    rows = sorted({int(row) for part in held for row in places[part or ...]})
    first, count = rows[0], len(rows)
    if rows[-1] - first + 1 != count or first % count or len(places) % count:
        raise InputError(
            f"This process's devices hold the places {rows} of the {len(places)} that MeshConfig "
            "splits a batch into, which is not one even part: make slice, data and fsdp so that "
            "each process has one."
        )
    return first // count, len(places) // count


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices.

    Args:
      batch: Arrays of shape [B / parts, …]; see `batch_part`.
      mesh: The mesh.

    Returns:
      Global arrays of shape [B, …], split by `batch_sharding`.
    """
    sharding, (_, parts) = batch_sharding(mesh), batch_part(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.asarray(array), (len(array) * parts, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def _divisible(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    kept = []
    for axes, size in zip(spec, shape, strict=False):
        names = axes if isinstance(axes, tuple) else (axes,)
        devices = math.prod(mesh.shape[name] for name in names if name is not None)
        kept.append(axes if size % devices == 0 else None)
    return PartitionSpec(*kept)


def _slot_spec(
    shape: Sequence[int], owner: tuple[Sequence[int], PartitionSpec] | None
) -> PartitionSpec:
    if owner is None:
        return PartitionSpec()
    owner_shape, spec = owner
    axes = tuple(spec) + (None,) * (len(owner_shape) - len(spec))
    if tuple(shape) == tuple(owner_shape):
        return PartitionSpec(*axes)
    for dropped in range(len(owner_shape)):
        rest = [i for i in range(len(owner_shape)) if i != dropped]
        if tuple(shape) == tuple(owner_shape[i] for i in rest):
            return PartitionSpec(*(axes[i] for i in rest))
    return PartitionSpec()


def _path(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
