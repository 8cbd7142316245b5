"""Attention against a plain NumPy version; padding never makes a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.models.attention import attention
from salt_jax.models.reference_attention import PLAIN, ScoreOptions, causal_segment_mask

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 3, 3, 3]], np.int32)


def random_inputs(heads: int, kv_heads: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(2, 8, heads, 4), (2, 8, kv_heads, 4), (2, 8, kv_heads, 4)]
    return [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def numpy_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    segments: np.ndarray,
    both_ways: np.ndarray | None = None,
    options: ScoreOptions = PLAIN,
) -> np.ndarray:
    """One query at a time, in float64."""
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b, i, h in np.ndindex(batch, length, heads):
        ahead = np.arange(length) <= i
        if options.window is not None:
            ahead &= i - np.arange(length) < options.window
        if both_ways is not None and both_ways[b, i]:
            ahead = ahead | both_ways[b]
        seen = [j for j in range(length) if ahead[j] and segments[b, j] == segments[b, i]]
        keys = key[b, seen, h // group].astype(np.float64)
        scores = keys @ query[b, i, h].astype(np.float64)
        scores *= options.scale_of(width)
        if options.soft_cap is not None:
            scores = options.soft_cap * np.tanh(scores / options.soft_cap)
        shares = np.exp(scores - scores.max())
        out[b, i, h] = shares / shares.sum() @ value[b, seen, h // group].astype(np.float64)
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equals_numpy(heads: int, kv_heads: int, scale: float) -> None:
    inputs = random_inputs(heads, kv_heads, scale)
    mixed = attention(*map(jnp.asarray, inputs), jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(mixed, numpy_attention(*inputs, SEGMENTS), rtol=2e-4, atol=2e-4)


OPTIONS = [ScoreOptions(window=2), ScoreOptions(0.3, soft_cap=0.7), ScoreOptions(0.2, 2.0, 3)]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_equal_numpy(options: ScoreOptions) -> None:
    inputs = random_inputs(4, 2)
    arrays = [jnp.asarray(x) for x in (*inputs, SEGMENTS)]
    mixed = attention(*arrays, options=options)
    expected = numpy_attention(*inputs, SEGMENTS, options=options)
    np.testing.assert_allclose(mixed, expected, rtol=2e-4, atol=2e-4)
    assert not np.allclose(mixed, attention(*arrays), atol=1e-2)


def test_padding_is_finite_in_values_and_gradients() -> None:
    segments = jnp.zeros((2, 8), jnp.int32)  # nothing but padding
    inputs = [jnp.asarray(x) * 1e3 for x in random_inputs(2, 2)]
    mixed, gradients = jax.value_and_grad(
        lambda inputs: jnp.sum(attention(*inputs, segments)), allow_int=True
    )(inputs)
    assert np.isfinite(mixed)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_keeps_its_dtype_and_is_close() -> None:
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(4, 2)]
    mixed = attention(*inputs, jnp.asarray(SEGMENTS))
    assert mixed.dtype == jnp.bfloat16
    exact = numpy_attention(*(np.asarray(x, np.float32) for x in inputs), SEGMENTS)
    np.testing.assert_allclose(np.asarray(mixed, np.float32), exact, atol=0.05)


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_a_prefix_sees_itself_in_both_directions(backend: str) -> None:
    both_ways = np.array([[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], bool)
    inputs = random_inputs(4, 2)
    arrays = [jnp.asarray(x) for x in (*inputs, SEGMENTS, both_ways)]
    mixed = attention(*arrays, backend=backend)
    expected = numpy_attention(*inputs, SEGMENTS, both_ways)
    np.testing.assert_allclose(mixed, expected, rtol=2e-4, atol=2e-4)
    assert not np.allclose(mixed, numpy_attention(*inputs, SEGMENTS), atol=1e-2)
    with pytest.raises(InputError, match="attention_backend is 'splash', which is causal"):
        attention(*arrays, backend="splash")


def test_mask_is_causal_and_within_the_segment() -> None:
    mask = np.asarray(causal_segment_mask(jnp.asarray([[1, 1, 2, 0]])))[0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))
