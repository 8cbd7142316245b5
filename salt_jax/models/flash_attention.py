"""Flash attention, which never stores [L, L] scores: cuDNN's on NVIDIA GPUs, Splash on TPUs.

Both take the arrays of attention.attention and agree with the reference up to rounding.
`cudnn_obstacle` and `splash_obstacle` return the reason why a kernel can't be used, or None.

XLA cannot partition a Pallas kernel such as Splash. Under a mesh, jax.shard_map therefore gives
each device its own rows and heads, by the rules of the logical axes "batch" and "activation_heads".
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

from salt_jax.models.reference_attention import (
    OUTPUT_NAME,
    PLAIN,
    ScoreOptions,
    causal_segment_mask,
)

_LANES = 128  # the width of a TPU's vector register
_LARGEST_BLOCK = 640  # its float32 scores are 1.6 MB of 16 MB of vector memory

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def cudnn_obstacle(
    platform: str, length: int, width: int, dtype: Any, options: ScoreOptions
) -> str | None:
    """Why cuDNN's kernel can't be used for rows of `length` and heads of `width`, or None."""
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
    if options.soft_cap is not None:
        return "cuDNN's flash attention has no soft cap (DecoderConfig.attention_soft_cap)"
    return None


def cudnn_attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    *,
    options: ScoreOptions = PLAIN,
) -> jax.Array:
    """cuDNN's flash attention.

    Segments and windows are an additive mask [B, 1, L, L] in addition to cuDNN's causal one. Its
    packed layout would need no such mask, but a fixed bound on the segments of a row.
    """

    def kernel(query: Any, key: Any, value: Any, segment_ids: Any) -> jax.Array:
        mask_Bx1xLxL = causal_segment_mask(segment_ids, window=options.window)[:, None]
        mixed: jax.Array = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask_Bx1xLxL,
            scale=options.scale,
            is_causal=True,
            implementation="cudnn",
        )
        return checkpoint_name(mixed, OUTPUT_NAME)

    return _over_mesh(kernel, query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)


def splash_obstacle(
    platform: str, length: int, width: int, dtype: Any, options: ScoreOptions
) -> str | None:
    """Why Splash can't be used for rows of `length`, or None; any `width` and options will do."""
    del width, dtype, options
    if platform != "tpu":
        return f"Splash attention needs a TPU and this program is for {platform}"
    if length % _LANES:
        return f"rows of {length} tokens are not a multiple of {_LANES}"
    return None


def splash_attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    *,
    options: ScoreOptions = PLAIN,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, a Pallas kernel that skips the blocks above the diagonal.

    With `interpret` the kernel runs as plain operations, slowly and on any device.
    """
    length, width = query_BxLxHxK.shape[1], query_BxLxHxK.shape[3]
    block = splash_block(length)
    mask: Any = splash.CausalMask((length, length))
    if options.window is not None:
        mask = splash.LocalMask((length, length), (options.window - 1, 0), offset=0)

    def kernel(query: Any, key: Any, value: Any, segment_ids: Any) -> jax.Array:
        attend = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash.BlockSizes(
                *(block, block, block), *(block, block, block), *(block, block)
            ),
            residual_checkpoint_name=OUTPUT_NAME,
            attn_logits_soft_cap=options.soft_cap,
            interpret=interpret,
        )
        heads_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
        segments = splash.SegmentIds(segment_ids, segment_ids)
        mixed_BxHxLxK: jax.Array = jax.vmap(attend)(*heads_first, segments)
        return mixed_BxHxLxK.transpose(0, 2, 1, 3)

    scaled_BxLxHxK = query_BxLxHxK * options.scale_of(width)
    return _over_mesh(kernel, scaled_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)


def splash_block(length: int) -> int:
    """The size of a block of queries or keys: the largest allowed that divides `length`."""
    sizes = range(_LANES, _LARGEST_BLOCK + 1, _LANES)
    return max(size for size in sizes if length % size == 0)


def _over_mesh(
    kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Runs a kernel on each device of the mesh in context, on the device's own rows and heads.

    Rows or heads that can't be split evenly are computed on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value, segment_ids)
    rows, _ = _shards("batch", query.shape[0], mesh)
    heads, head_shards = _shards("activation_heads", query.shape[2], mesh)
    # Each device needs whole groups, so a group that several devices share is repeated for each.
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
    """The mesh axes of a logical axis and their number of devices; (None, 1) if it is uneven."""
    spec = nn.logical_to_mesh_axes((logical_axis,))
    axes = spec[0] if spec else None
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    devices = math.prod(mesh.shape[name] for name in names)
    return (axes, devices) if size % devices == 0 else (None, 1)


def _is_ampere_or_later() -> bool:
    """Whether this process's GPUs support cuDNN's flash attention; True if it has no GPU."""
    if jax.default_backend() != "gpu":
        return True
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]  # AMD's look like "gfx90a"
    return major.isdecimal() and int(major) >= 8
