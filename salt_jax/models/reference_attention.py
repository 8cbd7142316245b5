"""Attention by plain XLA products, on any device: the reference for the other backends."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from salt_jax.models.layers import soft_capped

# The name of attention's output for remat policies.
OUTPUT_NAME = "attention_output"

# Far below every score, and finite, so that a row whose scores are all masked out gives no NaN.
MASKED_SCORE = -1e30


class ScoreOptions(NamedTuple):
    """How attention's scores are computed, beyond q·k / √K.

    Attributes:
      scale: Multiplies q·k; 1 / √K if None.
      soft_cap: See layers.soft_capped.
      window: A position attends to this many positions up to its own; None for all.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None

    def scale_of(self, width: int) -> float:
        """What q·k is multiplied by for heads of `width`."""
        return 1.0 / math.sqrt(width) if self.scale is None else self.scale


PLAIN = ScoreOptions()


def reference_attention(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    segment_ids_BxL: jax.Array,
    bidirectional_BxL: jax.Array | None = None,
    options: ScoreOptions = PLAIN,
) -> jax.Array:
    """attention.attention with whole [L, L] scores.

    R = H / G query heads share a group's keys. RL is the axis of their R · L queries, head after
    head; as two axes the softmax would be half as fast on a CPU. The L after it counts keys.
    """
    batch, length, heads, width = query_BxLxHxK.shape
    groups = key_BxLxGxK.shape[2]
    query_BxHxLxK = (query_BxLxHxK * options.scale_of(width)).transpose(0, 2, 1, 3)
    query_BxGxRLxK = query_BxHxLxK.reshape(batch, groups, -1, width)
    key_BxGxLxK = key_BxLxGxK.transpose(0, 2, 1, 3)
    value_BxGxLxK = value_BxLxGxK.transpose(0, 2, 1, 3)

    scores_BxGxRLxL = jnp.einsum(
        "bgqk,bgmk->bgqm", query_BxGxRLxK, key_BxGxLxK, preferred_element_type=jnp.float32
    )
    scores_BxGxRLxL = soft_capped(scores_BxGxRLxL, options.soft_cap)
    visible_BxLxL = causal_segment_mask(segment_ids_BxL, bidirectional_BxL, options.window)
    visible_BxRLxL = jnp.tile(visible_BxLxL, (1, heads // groups, 1))
    scores_BxGxRLxL = jnp.where(visible_BxRLxL[:, None], scores_BxGxRLxL, MASKED_SCORE)
    shares_BxGxRLxL = jax.nn.softmax(scores_BxGxRLxL, axis=-1).astype(value_BxLxGxK.dtype)
    mixed_BxGxRLxK = jnp.einsum("bgqm,bgmk->bgqk", shares_BxGxRLxL, value_BxGxLxK)
    mixed_BxHxLxK = mixed_BxGxRLxK.reshape(batch, heads, length, width)
    return checkpoint_name(mixed_BxHxLxK.transpose(0, 2, 1, 3), OUTPUT_NAME)


def causal_segment_mask(
    segment_ids_BxL: jax.Array,
    bidirectional_BxL: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """[B, L, L] bool: whether the query (second axis) attends to the key (third axis)."""
    length = segment_ids_BxL.shape[1]
    causal_LxL = jnp.tril(jnp.ones((length, length), dtype=bool))
    same_segment_BxLxL = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    if window is not None:
        causal_LxL &= jnp.triu(jnp.ones((length, length), dtype=bool), 1 - window)
    seen_BxLxL = causal_LxL[None]
    if bidirectional_BxL is not None:
        seen_BxLxL |= bidirectional_BxL[:, :, None] & bidirectional_BxL[:, None, :]
    return same_segment_BxLxL & seen_BxLxL
