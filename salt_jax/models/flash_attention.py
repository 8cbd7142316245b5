"""Attention that keeps no [L, L] scores: cuDNN's on NVIDIA GPUs, Splash (Pallas) on TPUs.

Both compute attention.attention. `cudnn_obstacle` and `splash_obstacle` return the reason why a
kernel can't be used, or None.

XLA cannot partition a Pallas kernel. Under a mesh, jax.shard_map therefore gives each device its
own rows and heads, by the logical-axis rules of "batch" and "activation_heads".
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from salt_jax.models.reference_attention import OUTPUT_NAME, causal_segment_mask

_LANES = 128  # numbers that lie side by side in a TPU's vector register
_LARGEST_BLOCK = 640  # its float32 scores are 1.6 MB of 16 MB of vector memory

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def cudnn_obstacle(platform: str, length: int, width: int, dtype: Any) -> str | None:
    """Why cuDNN can't attend over rows of `length` with heads of `width`, if it can't."""
    if platform not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU and this program is for {platform}"
    if not _is_ampere_or_later():
        return "cuDNN's flash attention needs an NVIDIA GPU of compute capability 8.0 or more"
    if dtype != jnp.bfloat16:
        return f"cuDNN's flash attention takes bfloat16 and DecoderConfig.dtype is {dtype}"
    if width > 128 or width % 8:
        return f"heads of {width} are not a multiple of 8 of at most 128"
    if length % 2:
        return f"rows of {length} tokens are not of even length"
    return None


def cudnn_attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
) -> jax.Array:
    """cuDNN's flash attention.

    The segments are an additive mask [B, 1, L, L] beside cuDNN's own causal one. Its packed layout
    needs no mask, but a fixed bound on the segments of a row.
    """

    def kernel(query: Any, key: Any, value: Any, segment_ids: Any) -> jax.Array:
        mask_Bx1xLxL = causal_segment_mask(segment_ids)[:, None]
        mixed: jax.Array = jax.nn.dot_product_attention(
            query, key, value, mask=mask_Bx1xLxL, is_causal=True, implementation="cudnn"
        )
        return checkpoint_name(mixed, OUTPUT_NAME)

    return _over_mesh(kernel, query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)


def splash_obstacle(platform: str, length: int, width: int, dtype: Any) -> str | None:
    """Why Splash can't attend over rows of `length` with heads of `width`, if it can't."""
    if platform != "tpu":
        return f"Splash attention needs a TPU and this program is for {platform}"
    if width % _LANES:
        return f"heads of {width} are not a multiple of {_LANES}"
    if length % _LANES:
        return f"rows of {length} tokens are not a multiple of {_LANES}"
    return None


def splash_attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention: blocks ahead of the diagonal are never computed.

    Args:
        query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL: see attention.attention.
        interpret: run the kernel as plain operations, on any device and slowly.
    """
    length, width = query_BxLxHxK.shape[1], query_BxLxHxK.shape[3]
    block = splash_block(length)

    def kernel(query: Any, key: Any, value: Any, segment_ids: Any) -> jax.Array:
        attend = splash.make_splash_mha(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash.BlockSizes(
                *(block, block, block), *(block, block, block), *(block, block)
            ),
            residual_checkpoint_name=OUTPUT_NAME,
            interpret=interpret,
        )
        heads_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
        segments = splash.SegmentIds(segment_ids, segment_ids)
        mixed_BxHxLxK: jax.Array = jax.vmap(attend)(*heads_first, segments)
        return mixed_BxHxLxK.transpose(0, 2, 1, 3)

    scaled_BxLxHxK = query_BxLxHxK * (1.0 / math.sqrt(width))
    return _over_mesh(kernel, scaled_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)


def splash_block(length: int) -> int:
    """The size of Splash's blocks: the largest that divides a row of `length`."""
    sizes = range(_LANES, _LARGEST_BLOCK + 1, _LANES)
    return max(size for size in sizes if length % size == 0)


def _over_mesh(
    kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Runs a kernel on each device of the mesh in context with its own rows and heads.

    Rows or heads that don't divide evenly are computed whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value, segment_ids)
    rows, _ = _shards("batch", query.shape[0], mesh)
    heads, head_shards = _shards("activation_heads", query.shape[2], mesh)
    # Each device needs whole groups: a group that several devices share is copied to each.
    copies = math.lcm(key.shape[2], head_shards) // key.shape[2]
    if copies > 1:
        key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
    spec = PartitionSpec(rows, None, heads, None)
    mapped = jax.shard_map(
        kernel,
        in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
        out_specs=spec,
        check_vma=False,
    )
    return mapped(query, key, value, segment_ids)


def _shards(logical_axis: str, size: int, mesh: Any) -> tuple[Any, int]:
    """The mesh axes of a logical axis and the number of devices along them; none if uneven."""
    spec = nn.logical_to_mesh_axes((logical_axis,))
    axes = spec[0] if spec else None
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    devices = math.prod(mesh.shape[name] for name in names)
    return (axes, devices) if size % devices == 0 else (None, 1)


def _is_ampere_or_later() -> bool:
    """Whether this process's GPUs run cuDNN's flash attention; True if it has no GPU."""
    if jax.default_backend() != "gpu":
        return True
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]  # AMD's are such as "gfx90a"
    return major.isdecimal() and int(major) >= 8
