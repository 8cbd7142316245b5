"""Decoding with a cache gives what the whole forward pass gives, on every mesh."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st

from salt_jax.inference import decoding
from salt_jax.inference.sampling import Sampling
from salt_jax.models import decoder
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training.partitioning import MeshConfig, param_shardings, partitioned

SMALL = DecoderConfig(
    embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24, vocab_size=50
)
LENGTHS, PROMPTS, SLOTS = (12, 9, 12, 7), (5, 1, 8, 2), 16
TOKENS = np.random.default_rng(0).integers(50, size=(4, 12)).astype(np.int32)


def make_params(config: DecoderConfig) -> Any:
    """Parameters with nothing at its special initial value, so that every one has an effect."""
    rng = np.random.default_rng(1)

    def make(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.25, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(make, nn.unbox(decoder.abstract_params(config)))


@functools.partial(jax.jit, static_argnums=0)
def whole_logits(config: DecoderConfig, params: Any) -> jax.Array:
    """[B, L, V] of TOKENS, without a cache, padded on the right."""
    positions_BxL = jnp.tile(jnp.arange(12)[None], (4, 1))
    segment_ids_BxL = (positions_BxL < jnp.array(LENGTHS)[:, None]).astype(jnp.int32)
    batch = {"inputs": TOKENS, "segment_ids": segment_ids_BxL, "positions": positions_BxL}
    hidden_BxLxD = decoder.hidden_states(config, params, batch)
    return decoder.logits(hidden_BxLxD, decoder.head_kernel(params, config), config)


def padded(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts on the right, and what says so; the padding's ids must not matter."""
    prompts_BxL = np.full((len(rows), length), 7, np.int32)
    segment_ids_BxL = np.zeros_like(prompts_BxL)
    for row, prompt_L, segment_ids_L in zip(rows, prompts_BxL, segment_ids_BxL, strict=True):
        prompt_L[-len(row) :], segment_ids_L[-len(row) :] = row, 1
    return prompts_BxL, segment_ids_BxL


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(config: DecoderConfig, params: Any) -> jax.Array:
    """[steps, B, V]: of the prompts' ends, then of each token given after them."""
    prompts = [row[:length] for row, length in zip(TOKENS, PROMPTS, strict=True)]
    logits_BxV, cache = decoding.prefill(config, params, *map(jnp.asarray, padded(prompts, 9)), 16)
    given_SxB = np.zeros((7, 4), np.int32)
    for b, (row, start) in enumerate(zip(TOKENS, PROMPTS, strict=True)):
        given_SxB[: len(row) - start, b] = row[start : start + 7]

    def one(
        cache: decoding.DecodingCache, token_B: jax.Array
    ) -> tuple[decoding.DecodingCache, jax.Array]:
        logits_BxV, cache = decoding.step(config, params, cache, token_B)
        return cache, logits_BxV

    _, steps_SxBxV = jax.lax.scan(one, cache, given_SxB)
    return jnp.concatenate([logits_BxV[None], steps_SxBxV])


def assert_cached_equals_whole(config: DecoderConfig, tolerance: float) -> None:
    params = make_params(config)
    whole_BxLxV, cached_SxBxV = whole_logits(config, params), cached_logits(config, params)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        steps = min(length - prompt, 7) + 1
        whole_SxV = whole_BxLxV[row, prompt - 1 :][:steps]
        np.testing.assert_allclose(cached_SxBxV[: len(whole_SxV), row], whole_SxV, atol=tolerance)
    assert np.abs(whole_BxLxV).max() < 10


PYTHIA = {
    "rope_fraction": 0.5,
    "parallel_residual": True,
    "use_bias": True,
    "norm": "layernorm",
    "gated_mlp": False,
    "mlp_activation": "gelu",
    "num_kv_heads": 4,
    "tied_embeddings": False,
    "scale_embeddings": False,
}
LLAMA = {"num_kv_heads": 2, "tied_embeddings": False, "scale_embeddings": False}


@settings(max_examples=6, deadline=None)
@example(changes={**PYTHIA, "scan_layers": True})
@example(changes={**PYTHIA, "scan_layers": False})
@example(changes={**LLAMA, "scan_layers": True})
@given(
    changes=st.fixed_dictionaries(
        {
            "num_kv_heads": st.sampled_from([1, 2, 4]),
            "rope_fraction": st.sampled_from([0.0, 0.5, 1.0]),
            "parallel_residual": st.booleans(),
            "use_bias": st.booleans(),
            "norm": st.sampled_from(["rmsnorm", "layernorm"]),
            "gated_mlp": st.booleans(),
            "tied_embeddings": st.booleans(),
            "scan_layers": st.booleans(),
            "remat": st.sampled_from(["none", "full"]),
        }
    )
)
def test_cached_logits_equal_the_whole_forward(changes: dict[str, Any]) -> None:
    assert_cached_equals_whole(dataclasses.replace(SMALL, **changes), 1e-5)


def test_cached_logits_equal_the_whole_forward_in_bfloat16() -> None:
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    assert_cached_equals_whole(config, 0.05)
    _, cache = jax.eval_shape(
        functools.partial(decoding.prefill, config, slots=16),
        make_params(config),
        *padded([TOKENS[0]], 12),
    )
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_mesh_splits_the_cache_and_changes_nothing(scan_layers: bool) -> None:
    config = dataclasses.replace(SMALL, scan_layers=scan_layers)
    params = make_params(config)
    arrays = padded([row[:n] for row, n in zip(TOKENS, PROMPTS, strict=True)], 8)
    choice = decoding.Choice(Sampling(1.0, top_k=20, top_p=0.9), vocab_size=50, end_ids=(1,))
    rows_B = np.arange(4, dtype=np.int32)

    def generate(params: Any) -> tuple[decoding.State, jax.Array, jax.Array]:
        state, first_Bx1, first_log_p = decoding.begin(
            config, params, *arrays, rows_B, jnp.uint32(3), slots=SLOTS, choice=choice
        )
        state, tokens_BxC, log_p_BxC = decoding.advance(
            config, params, state, jnp.int32(6), chunk=8, choice=choice
        )
        both = [(first_Bx1, tokens_BxC), (first_log_p, log_p_BxC)]
        tokens, log_p = (jnp.concatenate(pair, axis=1) for pair in both)
        return state, tokens, log_p

    _, tokens, log_p = jax.jit(generate)(params)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make()
    shardings = param_shardings(decoder.abstract_params(config), mesh)
    with partitioned(mesh):
        state, mesh_tokens, mesh_log_p = jax.jit(generate)(jax.device_put(params, shardings))
    np.testing.assert_array_equal(mesh_tokens, tokens)
    np.testing.assert_allclose(mesh_log_p, log_p, atol=1e-5)
    assert np.asarray(tokens)[:, :7].min() >= decoding.NO_TOKEN
    assert (np.asarray(tokens)[:, 7:] == decoding.NO_TOKEN).all()
    # Rows over data and fsdp, key-value heads over tensor.
    parts = {x.sharding.shard_shape(x.shape)[-4:] for x in jax.tree.leaves(state.cache.layers)}
    assert parts == {(1, 1, SLOTS, 4)}


def test_the_loop_ends_when_all_rows_have() -> None:
    params, arrays = make_params(SMALL), padded([TOKENS[0, :3], TOKENS[1, :5]], 5)
    choice = decoding.Choice(Sampling(), vocab_size=50, end_ids=(50,))  # which is never chosen
    rows_B = np.array([0, -1], np.int32)
    begin = jax.jit(functools.partial(decoding.begin, SMALL, slots=16, choice=choice))
    state, tokens_Bx1, _ = begin(params, *arrays, rows_B, jnp.uint32(0))
    assert np.asarray(state.finished).tolist() == [False, True]  # the row that fills the batch
    assert (np.asarray(tokens_Bx1)[:, 0] == decoding.NO_TOKEN).tolist() == [False, True]
    advance = jax.jit(functools.partial(decoding.advance, SMALL, chunk=8, choice=choice))
    after, tokens_BxC, _ = advance(params, state, jnp.int32(5))
    assert after.made - state.made == 5
    assert (np.asarray(tokens_BxC[0]) >= 0).tolist() == [True] * 5 + [False] * 3
    ended = state._replace(finished=jnp.array([True, True]))
    after, tokens_BxC, _ = advance(params, ended, jnp.int32(5))
    assert after.made == state.made
    assert (np.asarray(tokens_BxC) == decoding.NO_TOKEN).all()
