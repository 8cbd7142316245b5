"""Rotary embedding, norms and projections against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from salt_jax.models import layers


@pytest.mark.parametrize("rotary_dim", [0, 2, 4, 8])
def test_rotation_equals_complex_multiplication(rotary_dim: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 1000]])
    half = rotary_dim // 2
    expected = x.astype(np.float64)
    for b, i, d in np.ndindex(2, 5, half):
        turn = np.exp(1j * positions[b, i] * 100.0 ** (-2 * d / rotary_dim))
        turned = (x[b, i, :, d] + 1j * x[b, i, :, d + half]) * turn
        expected[b, i, :, d], expected[b, i, :, d + half] = turned.real, turned.imag
    angles = layers.rotary_angles(jnp.asarray(positions), rotary_dim, 100.0)
    rotated = layers.rotate(jnp.asarray(x), angles)
    np.testing.assert_allclose(rotated, expected, atol=2e-4)


def test_scores_depend_on_distance_alone() -> None:
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(query_position: int, key_position: int) -> float:
        turned = [
            layers.rotate(x, layers.rotary_angles(jnp.array([[position]]), 16, 1e4))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(3, 7), rel=1e-2)


@pytest.mark.parametrize(("kind", "use_bias"), [("rmsnorm", True), ("layernorm", True)])
def test_norms_equal_numpy(kind: str, use_bias: bool) -> None:
    x = 5.0 + np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    norm = layers.Norm(kind, 1e-5, use_bias, "float32", "float32", ((16, "embed"),))
    params = nn.unbox(norm.init(jax.random.key(0), jnp.asarray(x))["params"])
    assert set(params) == ({"scale", "bias"} if kind == "layernorm" else {"scale"})
    params = jax.tree.map(lambda p: p + jnp.arange(16) / 16, params)
    y = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    y = y * np.asarray(params["scale"]) + np.asarray(params.get("bias", np.zeros(16)))
    np.testing.assert_allclose(norm.apply({"params": params}, jnp.asarray(x)), y, atol=1e-4)


def test_projection_sums_over_its_input_axes() -> None:
    projection = layers.Projection(
        ((3, "heads"), (4, "head_dim")), ((5, "embed"),), 1.0, True, "float32", "float32"
    )
    x = jax.random.normal(jax.random.key(1), (2, 6, 3, 4))
    params = nn.unbox(projection.init(jax.random.key(0), x)["params"])
    params["bias"] += jnp.arange(5.0)
    expected = np.einsum("blhk,hkd->bld", x, params["kernel"]) + np.arange(5.0)
    np.testing.assert_allclose(projection.apply({"params": params}, x), expected, atol=1e-4)
