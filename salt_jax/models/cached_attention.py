"""Attention of new positions over themselves and over the keys and values of earlier ones."""

import math

import jax
import jax.numpy as jnp

from salt_jax.models.reference_attention import MASKED_SCORE, causal_segment_mask

# The decoder's Flax collections: what it reads of earlier positions, and what it leaves of its own.
CACHE = "cache"
NEW_KEYS_AND_VALUES = "new_keys_and_values"


def cached_attention(
    query_BxTxHxK: jax.Array,
    key_BxTxGxK: jax.Array,
    value_BxTxGxK: jax.Array,
    segment_ids_BxT: jax.Array,
    cached_key_BxGxSxK: jax.Array,
    cached_value_BxGxSxK: jax.Array,
    cached_segment_ids_BxS: jax.Array,
) -> jax.Array:
    """See attention.attention, for T new positions after S earlier ones.

    The cache is read where it lies: its scores and those of the new positions are joined, not the
    keys. A slot of the cache that holds nothing has segment id 0.

    Returns:
        [B, T, H, K] in the dtype of the queries.
    """
    batch, new, heads, width = query_BxTxHxK.shape
    groups, slots = cached_key_BxGxSxK.shape[1:3]
    query_BxHxTxK = (query_BxTxHxK * (1.0 / math.sqrt(width))).transpose(0, 2, 1, 3)
    query_BxGxRTxK = query_BxHxTxK.reshape(batch, groups, -1, width)

    def scores(key_BxGxNxK: jax.Array) -> jax.Array:
        return jnp.einsum(
            "bgqk,bgnk->bgqn", query_BxGxRTxK, key_BxGxNxK, preferred_element_type=jnp.float32
        )

    def mixture(shares_BxGxRTxN: jax.Array, value_BxGxNxK: jax.Array) -> jax.Array:
        return jnp.einsum("bgqn,bgnk->bgqk", shares_BxGxRTxN, value_BxGxNxK)

    # N = S + T: the cache, then the new positions.
    new_scores = scores(key_BxTxGxK.transpose(0, 2, 1, 3))
    scores_BxGxRTxN = jnp.concatenate([scores(cached_key_BxGxSxK), new_scores], axis=-1)
    in_cache_BxTxS = segment_ids_BxT[:, :, None] == cached_segment_ids_BxS[:, None, :]
    visible_BxTxN = jnp.concatenate([in_cache_BxTxS, causal_segment_mask(segment_ids_BxT)], axis=-1)
    visible_BxRTxN = jnp.tile(visible_BxTxN, (1, heads // groups, 1))
    scores_BxGxRTxN = jnp.where(visible_BxRTxN[:, None], scores_BxGxRTxN, MASKED_SCORE)
    shares_BxGxRTxN = jax.nn.softmax(scores_BxGxRTxN, axis=-1).astype(value_BxTxGxK.dtype)
    mixed_BxGxRTxK = mixture(shares_BxGxRTxN[..., :slots], cached_value_BxGxSxK)
    mixed_BxGxRTxK += mixture(shares_BxGxRTxN[..., slots:], value_BxTxGxK.transpose(0, 2, 1, 3))
    return mixed_BxGxRTxK.reshape(batch, heads, new, width).transpose(0, 2, 1, 3)
