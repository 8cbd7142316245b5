"""Attention of one new position per row over itself and the cached keys and values."""

import jax
import jax.numpy as jnp

from salt_jax.models.layers import soft_capped
from salt_jax.models.reference_attention import MASKED_SCORE, PLAIN, ScoreOptions

# The decoder's Flax collections of cached and of new keys and values.
CACHE = "cache"
NEW_KEYS_AND_VALUES = "new_keys_and_values"


def cached_attention(
    query_Bx1xHxK: jax.Array,
    key_Bx1xGxK: jax.Array,
    value_Bx1xGxK: jax.Array,
    segment_ids_Bx1: jax.Array,
    cached_key_BxGxSxK: jax.Array,
    cached_value_BxGxSxK: jax.Array,
    cached_segment_ids_BxS: jax.Array,
    slot: jax.Array,
    options: ScoreOptions = PLAIN,
) -> jax.Array:
    """The output of attention.attention at the last position.

    The scores of the cached keys and of the new one are concatenated rather than the keys, so that
    the cache is not copied. Empty slots have a different segment id than the new position, whose
    slot is `slot`. Returns [B, 1, H, K] in the dtype of the queries.
    """
    batch, _, heads, width = query_Bx1xHxK.shape
    groups, slots = cached_key_BxGxSxK.shape[1:3]
    scaled_Bx1xHxK = query_Bx1xHxK * options.scale_of(width)
    query_BxGxRxK = scaled_Bx1xHxK.reshape(batch, groups, -1, width)
    key_BxGx1xK, value_BxGx1xK = key_Bx1xGxK.swapaxes(1, 2), value_Bx1xGxK.swapaxes(1, 2)

    def scores(key_BxGxNxK: jax.Array) -> jax.Array:
        products_BxGxRxN = jnp.einsum(
            "bgrk,bgnk->bgrn", query_BxGxRxK, key_BxGxNxK, preferred_element_type=jnp.float32
        )
        return soft_capped(products_BxGxRxN, options.soft_cap)

    # N = S + 1: the cache, then the new position.
    visible_BxS = cached_segment_ids_BxS == segment_ids_Bx1
    if options.window is not None:
        visible_BxS &= (slot - jnp.arange(slots) < options.window)[None]
    cached_BxGxRxS = jnp.where(visible_BxS[:, None, None], scores(cached_key_BxGxSxK), MASKED_SCORE)
    scores_BxGxRxN = jnp.concatenate([cached_BxGxRxS, scores(key_BxGx1xK)], axis=-1)
    shares_BxGxRxN = jax.nn.softmax(scores_BxGxRxN, axis=-1).astype(value_Bx1xGxK.dtype)
    mixed_BxGxRxK = jnp.einsum("bgrs,bgsk->bgrk", shares_BxGxRxN[..., :slots], cached_value_BxGxSxK)
    mixed_BxGxRxK += shares_BxGxRxN[..., slots:] * value_BxGx1xK
    return mixed_BxGxRxK.reshape(batch, 1, heads, width)
