"""Partitioning: a mesh of devices, logical-axis rules, and the shardings of arrays.

The model names the logical axes of its parameters; rules map them to mesh axes. From the
NamedShardings of parameters, optimizer state and batches jax.jit partitions a program.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
    """The number of devices along each mesh axis; one may be -1, for all remaining devices.

    Attributes:
      slice: TPU slices (or GPU nodes) joined by the slow network; the batch is split over them.
      data: Devices that hold whole copies of the parameters and split the batch.
      fsdp: Devices that split the batch, the parameters and the optimizer state.
      tensor: Devices that split heads, hidden units and the vocabulary.
    """

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes()
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise InputError(
                f"MeshConfig got {vars(self)}: every axis must be at least 1, and at most one of "
                "them -1."
            )

    def sizes(self) -> tuple[int, ...]:
        """Devices along slice, data, fsdp and tensor."""
        return (self.slice, self.data, self.fsdp, self.tensor)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices`, by default all devices.

        On TPUs, neighbours along an axis are neighbours on the chips' network. Others keep JAX's
        order, in which the GPUs of a node follow each other.

        Raises:
          InputError: The axes don't multiply to the number of devices, or `slice` is not the number
            of TPU slices.
        """
        devices = list(jax.devices() if devices is None else devices)
        fixed = math.prod(size for size in self.sizes() if size != -1)
        sizes = [len(devices) // fixed if size == -1 else size for size in self.sizes()]
        if math.prod(sizes) != len(devices):
            raise InputError(
                f"MeshConfig's axes {vars(self)} need {math.prod(sizes) or fixed} devices and "
                f"there are {len(devices)}: change its slice, data, fsdp or tensor."
            )
        if devices[0].platform == "tpu":
            grid = _tpu_grid(sizes, devices)
        else:
            grid = np.asarray(devices, dtype=object).reshape(sizes)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """A context to trace programs in, where `rules` constrain activations."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def param_shardings(boxed_params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for every parameter, from the logical axis names in its box.

    A parameter is replicated along a mesh axis that doesn't divide its dimension.
    """

    def one(box: Any) -> NamedSharding:
        names = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * box.ndim
        shape = nn.unbox(box).shape
        spec = nn.logical_to_mesh_axes(names, rules)
        return NamedSharding(mesh, _divisible(spec or PartitionSpec(), shape, mesh))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(one, boxed_params, is_leaf=is_box)


def optimizer_shardings(opt_state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of an abstract optimizer state: each slot is sharded like its parameter.

    The path of a slot ends in its parameter's path. A factored slot (Adafactor's, of one dimension
    less) keeps the axes of its dimensions; anything else, such as a counter, is replicated.
    """
    by_path = {
        _path(path): (leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def one(path: Any, slot: Any) -> NamedSharding:
        names = _path(path)
        owner = next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), None)
        return NamedSharding(mesh, _slot_spec(slot.shape, owner))

    return jax.tree_util.tree_map_with_path(one, opt_state)


def slices_compute_apart(tensor: int, rules: Rules) -> bool:
    """Whether each slice can compute its gradients by itself, so that they are added up once.

    Not where rules split more than the batch over slices, nor where the tensor axis splits the
    vocabulary: within a manual axis XLA can't partition its look-up (jax 0.10.2 aborts).
    """
    split = {name for name, axes in rules if "slice" in (axes or ())}
    return tensor == 1 and split == {"batch"}


def within_slice(mesh: Mesh, rules: Rules) -> tuple[AbstractMesh, Rules]:
    """Mesh and rules for a program that is manual over the slices, each with its own rows."""
    own = mesh.abstract_mesh.update_axis_types({"slice": AxisType.Manual})
    return own, tuple((name, BATCH_AXES[1:] if name == "batch" else axes) for name, axes in rules)


def head_sharding(mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> HeadSharding | None:
    """How the loss shards tokens and heads over the mesh; None on one device."""
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
    """Splits the first dimension of a batch over every mesh axis but tensor."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy of the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_divisor(mesh: Mesh) -> int:
    """The devices that a batch is split over, which must divide its rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def require_split(batch_size: int, mesh: Mesh, microbatches: int, of: str = "") -> None:
    """Raises InputError unless a batch can be split over the devices (`of` a topology, say)."""
    divisor = batch_divisor(mesh)
    if batch_size % (divisor * microbatches):
        raise InputError(
            f"batch_size {batch_size} can't be split over {divisor} devices{of} in {microbatches} "
            "microbatches: make it a multiple of devices × microbatches, or change microbatches or "
            "the mesh."
        )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """The part of every batch that this process reads: (its index, number of parts).

    Processes that share rows, because the tensor axis crosses them, have the same part.

    Raises:
      InputError: The processes' devices don't hold even shares of a batch.
    """
    shares = _shares(mesh)
    different = sorted(set(shares.values()))
    held = [place for share in different for place in share]
    if len(held) != batch_divisor(mesh) or len({len(share) for share in different}) > 1:
        raise InputError(
            f"The devices of the processes hold the parts {different} of the "
            f"{batch_divisor(mesh)} that MeshConfig splits a batch into, which are not even "
            "shares: change slice, data and fsdp so that each process has one."
        )
    return different.index(shares[jax.process_index()]), len(different)


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch, [B / parts, …], on its devices: global arrays [B, …].

    The rows of a part are in the places of the process's devices along the batch axes, which need
    not follow each other.
    """
    sharding, share = batch_sharding(mesh), _shares(mesh)[jax.process_index()]

    def one(array: np.ndarray) -> jax.Array:
        rows = len(array) // len(share)  # of a device

        def shard(index: Any) -> np.ndarray:
            first = share.index((index[0].start or 0) // rows) * rows
            return array[first : first + rows]

        shape = (rows * batch_divisor(mesh), *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: one(np.asarray(array)) for name, array in batch.items()}


@functools.cache
def _shares(mesh: Mesh) -> Mapping[int, tuple[int, ...]]:
    """The places along the batch axes that each process's devices hold, ascending."""
    shares: dict[int, set[int]] = {}
    for place, devices in enumerate(mesh.devices.reshape(batch_divisor(mesh), -1)):
        for device in devices:
            shares.setdefault(device.process_index, set()).add(place)
    return {process: tuple(sorted(places)) for process, places in shares.items()}


def _tpu_grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] != slices:
        raise InputError(
            f"There are {slices} TPU slices and MeshConfig.slice is {sizes[0]}, but that axis must "
            "be the one over the slow network between slices: add "
            f"--gin.partitioning.MeshConfig.slice={slices}."
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


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
    for dropped in (None, *range(len(owner_shape))):
        kept = [i for i in range(len(owner_shape)) if i != dropped]
        if tuple(shape) == tuple(owner_shape[i] for i in kept):
            return PartitionSpec(*(axes[i] for i in kept))
    return PartitionSpec()


def _path(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
