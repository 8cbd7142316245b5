"""Causal self-attention over packed rows: queries, keys, values, segment ids in, mixtures out.

Every backend computes what `_xla_attention`, the reference, computes; they differ in speed and
memory only.
"""

import math
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

# Far below every score, and finite: no row of scores, whatever it masks, makes a NaN.
_MASKED_SCORE = -1e30


def attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    *,
    backend: str = "xla",
) -> jax.Array:
    """Softmax attention, softmax(q·k / √K)·v, within one's own segment and not ahead of oneself.

    A position sees the positions of its row that have the same segment id and no greater index.
    Padding, segment 0, sees only padding: its output is of no use but always finite. H is a
    multiple of G: query head h reads key-value head h // (H / G) (arXiv 2305.13245).

    Args:
        query_BxLxHxK: queries, after rotary embedding, not scaled.
        key_BxLxGxK: keys, after rotary embedding.
        value_BxLxGxK: values.
        segment_ids_BxL: int32, 0 = padding, equal within a document.
        backend: one of BACKENDS.

    Returns:
        [B, L, H, K] in the dtype of the queries. The softmax itself is in float32.
    """
    return BACKENDS[backend](query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, segment_ids_BxL)


def _xla_attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
) -> jax.Array:
    """The reference: whole [L, L] scores, by batched products of plain matrices.

    R = H / G query heads share a group's keys: RL is their R · L queries, one head after the other;
    the L after it counts keys. Four axes and no more: a fifth halves the softmax's speed on CPU.
    """
    batch, length, heads, width = query_BxLxHxK.shape
    groups = key_BxLxGxK.shape[2]
    query_BxHxLxK = (query_BxLxHxK * (1.0 / math.sqrt(width))).transpose(0, 2, 1, 3)
    query_BxGxRLxK = query_BxHxLxK.reshape(batch, groups, -1, width)
    key_BxGxLxK = key_BxLxGxK.transpose(0, 2, 1, 3)
    value_BxGxLxK = value_BxLxGxK.transpose(0, 2, 1, 3)

    scores_BxGxRLxL = jnp.einsum(
        "bgqk,bgmk->bgqm", query_BxGxRLxK, key_BxGxLxK, preferred_element_type=jnp.float32
    )
    visible_BxRLxL = jnp.tile(causal_segment_mask(segment_ids_BxL), (1, heads // groups, 1))
    scores_BxGxRLxL = jnp.where(visible_BxRLxL[:, None], scores_BxGxRLxL, _MASKED_SCORE)
    shares_BxGxRLxL = jax.nn.softmax(scores_BxGxRLxL, axis=-1).astype(value_BxLxGxK.dtype)
    mixed_BxGxRLxK = jnp.einsum("bgqm,bgmk->bgqk", shares_BxGxRLxL, value_BxGxLxK)
    return mixed_BxGxRLxK.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def causal_segment_mask(segment_ids_BxL: jax.Array) -> jax.Array:
    """[B, L, L] bool: may the query at the second index see the key at the third?"""
    length = segment_ids_BxL.shape[1]
    causal_LxL = jnp.tril(jnp.ones((length, length), dtype=bool))
    same_segment_BxLxL = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    return same_segment_BxLxL & causal_LxL[None]


BACKENDS: Mapping[str, Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]] = (
    types.MappingProxyType({"xla": _xla_attention})
)
