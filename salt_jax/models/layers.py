"""The layers of a block: projection, norm, rotary embedding, activations.

Activations are in the compute dtype; statistics and angles are float32. Parameters are in
param_dtype and boxed with their logical axes.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from salt_jax.models.rope_scaling import RopeScaling

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = types.MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }
)

Axes = tuple[tuple[int, str], ...]  # size and logical name of each axis
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines [B, L, 1, rotary_dim / 2], float32


class Projection(nn.Module):
    """A matrix product over the last axes of [B, L, …], with an optional bias.

    Attributes:
      inputs: The axes summed over.
      outputs: The axes that replace them.
      init_std: Standard deviation of the initial kernel; the initial bias is 0.
    """

    inputs: Axes
    outputs: Axes
    init_std: float
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.init_std)
        kernel = self._parameter("kernel", init, self.inputs + self.outputs)
        # As two matrices, since with more axes XLA takes twice as long for the gradient on CPU.
        width = math.prod(size for size, _ in self.inputs)
        y = x.reshape(-1, width) @ kernel.reshape(width, -1)
        y = y.reshape(*x.shape[:2], *(size for size, _ in self.outputs))
        if self.use_bias:
            y += self._parameter("bias", nn.initializers.zeros_init(), self.outputs)[None, None]
        return y

    def _parameter(self, name: str, init: nn.initializers.Initializer, axes: Axes) -> jax.Array:
        boxed_init = nn.with_logical_partitioning(init, tuple(name for _, name in axes))
        shape = tuple(size for size, _ in axes)
        value: Any = self.param(name, boxed_init, shape, jnp.dtype(self.param_dtype))
        return value.astype(self.dtype)


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis or axes, with a scale.

    Attributes:
      kind: "rmsnorm" or "layernorm".
      epsilon: Added to the mean square, or the variance, before its root.
      use_bias: Whether a LayerNorm has a bias.
      axes: The axes normalized together, each with an own scale: the last ones of the array.
    """

    kind: str
    epsilon: float
    use_bias: bool
    dtype: str
    param_dtype: str
    axes: Axes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, last = x.astype(jnp.float32), tuple(range(-len(self.axes), 0))
        if self.kind == "layernorm":
            y -= jnp.mean(y, axis=last, keepdims=True)
        mean_square = jnp.mean(jnp.square(y), axis=last, keepdims=True)
        y *= jax.lax.rsqrt(mean_square + self.epsilon)
        y *= self._parameter("scale", nn.initializers.ones_init(), x.ndim)
        if self.kind == "layernorm" and self.use_bias:
            y += self._parameter("bias", nn.initializers.zeros_init(), x.ndim)
        return y.astype(self.dtype)

    def _parameter(self, name: str, init: nn.initializers.Initializer, rank: int) -> jax.Array:
        boxed_init = nn.with_logical_partitioning(init, tuple(name for _, name in self.axes))
        shape = tuple(size for size, _ in self.axes)
        value: Any = self.param(name, boxed_init, shape, jnp.dtype(self.param_dtype))
        leading = tuple(range(rank - len(shape)))
        return jnp.expand_dims(value.astype(jnp.float32), leading)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap), as in Gemma 2; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotary_angles(
    positions_BxL: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Cosines and sines of position · theta^(-2i / rotary_dim) for i = 0 … rotary_dim / 2 - 1.

    Source: arXiv 2104.09864. With rotary_dim 0 both are empty.
    """
    exponents = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / max(rotary_dim, 1)
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies *= scaling.ratios(rotary_dim, theta)
    angles = positions_BxL.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    amplitude = 1.0 if scaling is None else scaling.amplitude
    if amplitude == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(x_BxLxHxK: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the first rotary_dim dimensions of each head by their angles.

    Dimension i is paired with i + rotary_dim / 2, as in GPT-NeoX and Llama.
    """
    cosines, sines = rotation
    half = cosines.shape[-1]
    if half == 0:
        return x_BxLxHxK
    x = x_BxLxHxK.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cosines - second * sines, second * cosines + first * sines, rest]
    return jnp.concatenate(turned, axis=-1).astype(x_BxLxHxK.dtype)
