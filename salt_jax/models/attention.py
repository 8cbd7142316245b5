"""Causal self-attention over packed rows, by one of several backends.

All agree with the reference, "xla", up to rounding; they differ in speed and memory only.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from salt_jax.errors import InputError
from salt_jax.models.flash_attention import (
    cudnn_attention,
    cudnn_obstacle,
    splash_attention,
    splash_obstacle,
)
from salt_jax.models.reference_attention import PLAIN, ScoreOptions, reference_attention

BACKENDS: Mapping[str, Callable[..., jax.Array]] = types.MappingProxyType(
    {"xla": reference_attention, "cudnn": cudnn_attention, "splash": splash_attention}
)
_OBSTACLES = types.MappingProxyType({"cudnn": cudnn_obstacle, "splash": splash_obstacle})


def attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    bidirectional_BxL: jax.Array | None = None,
    *,
    backend: str = "auto",
    options: ScoreOptions = PLAIN,
) -> jax.Array:
    """Softmax attention, softmax(q·k / √K)·v, causal and within a segment.

    A position attends to the positions of its row with the same segment id and no greater index.
    Padding (segment 0) attends only to padding; its output is meaningless but finite. H is a
    multiple of G: query head h uses key-value head h // (H / G) (arXiv 2305.13245).

    Args:
      query_BxLxHxK: Queries, after rotary embedding, not scaled.
      key_BxLxGxK: Keys, after rotary embedding.
      value_BxLxGxK: Values.
      segment_ids_BxL: int32; equal within a document, 0 for padding.
      bidirectional_BxL: bool; where True, the positions of a segment attend to each other in both
        directions. Only "xla" supports it, so "auto" chooses that. None is causal everywhere.
      backend: See choose_backend.
      options: The window, soft cap and scale of the scores. A window bounds causal attention only.

    Returns:
      [B, L, H, K] in the dtype of the queries. The softmax is computed in float32.

    Raises:
      InputError: The backend is not supported here.
    """
    if bidirectional_BxL is not None:
        require_bidirectional(backend)
        return reference_attention(
            *(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL, bidirectional_BxL),
            options=options,
        )
    length, width = query_BxLxHxK.shape[1], query_BxLxHxK.shape[3]
    platform, dtype = platform_in_context(), query_BxLxHxK.dtype
    chosen = choose_backend(backend, platform, length, width, dtype, options)
    heads = (query_BxLxHxK, key_BxLxGxK, value_BxLxGxK)
    return BACKENDS[chosen](*heads, segment_ids_BxL, options=options)


def require_bidirectional(backend: str) -> None:
    """Refuses a backend that does not support bidirectional attention."""
    if backend not in ("auto", "xla"):
        raise InputError(
            f"DecoderConfig.attention_backend is {backend!r}, which is causal everywhere, and "
            "Objectives.bidirectional_prefix is True: set attention_backend to 'xla' or 'auto', or "
            "bidirectional_prefix to False."
        )


def choose_backend(
    backend: str,
    platform: str,
    length: int,
    width: int,
    dtype: Any,
    options: ScoreOptions = PLAIN,
) -> str:
    """The name in BACKENDS of the backend that a program will use.

    Args:
      backend: One of BACKENDS, or "auto": "splash" on a TPU and "cudnn" on an NVIDIA GPU where they
        support these shapes, else "xla".
      platform: The devices' that the program is compiled for: "cpu", "gpu" or "tpu".
      length: L, tokens of a row.
      width: K, width of a head.
      dtype: The queries' dtype.
      options: Those of `attention`.

    Raises:
      InputError: A backend chosen by name is not supported, with the reason.
    """
    program = (platform, length, width, dtype, options)
    obstacles = {name: why(*program) for name, why in _OBSTACLES.items()}
    if backend == "auto":
        return next((name for name, obstacle in obstacles.items() if not obstacle), "xla")
    if obstacle := obstacles.get(backend):
        raise InputError(
            f"DecoderConfig.attention_backend is {backend!r}, but {obstacle}: set it to 'auto'."
        )
    return backend


def platform_in_context() -> str:
    """The platform of the mesh in context, or else of the default device.

    `salt plan` compiles for a mesh of devices that this machine doesn't have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
