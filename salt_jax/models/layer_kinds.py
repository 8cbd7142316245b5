"""The kinds of a decoder's layers: what each has of rotary embedding and of attention's scores."""

import jax
import jax.numpy as jnp

from salt_jax.models import layers
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.models.reference_attention import ScoreOptions


def _kinds(config: DecoderConfig) -> tuple[str, ...]:
    """The kinds that the model's layers have, in the order of first use."""
    return tuple(dict.fromkeys(config.layer_kinds))


def rotations_of(
    config: DecoderConfig, positions_BxL: jax.Array
) -> tuple[list[layers.Rotation], jax.Array | None]:
    """The rotation of each kind, and the kind of each layer, int32, or None if all have one."""

    def of(kind: str) -> layers.Rotation:
        if kind == "nope":
            # By the angle 0, unscaled.
            return layers.rotary_angles(0 * positions_BxL, config.rotary_dim, config.rope_theta)
        if kind == "local" and config.local_rope_theta is not None:
            return layers.rotary_angles(positions_BxL, config.rotary_dim, config.local_rope_theta)
        theta, scaling = config.rope_theta, config.rope_scaling
        return layers.rotary_angles(positions_BxL, config.rotary_dim, theta, scaling)

    kinds = _kinds(config)
    rotations = [of(kind) for kind in kinds]
    if len(kinds) == 1:
        return rotations, None
    return rotations, jnp.array([kinds.index(kind) for kind in config.kinds_of_layers], jnp.int32)


def score_options(config: DecoderConfig) -> list[ScoreOptions]:
    """The options of attention in each kind of layer."""
    scale, soft_cap = config.attention_scale, config.attention_soft_cap
    windows = (config.window if kind == "local" else None for kind in _kinds(config))
    return [ScoreOptions(scale, soft_cap, window) for window in windows]
