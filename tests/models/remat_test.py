"""Remat policies: the same gradients, and what each computes again to get them."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from salt_jax.models import attention, decoder, remat
from salt_jax.models.decoder import Decoder, DecoderConfig
from salt_jax.models.flash_attention import splash_attention

CONFIG = DecoderConfig(embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, vocab_size=50)


def gradients(config: DecoderConfig) -> Any:
    inputs = jax.random.randint(jax.random.key(2), (2, 8), 0, 50)
    batch = {
        "inputs": inputs,
        "segment_ids": jnp.ones_like(inputs),
        "positions": jnp.zeros_like(inputs) + jnp.arange(8)[None],
    }

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(decoder.hidden_states(config, params, batch)))

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("policy", remat.POLICIES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_gradients_stay_the_same(policy: str, scan_layers: bool) -> None:
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    plain = jax.jit(gradients(config))(params)
    recomputed = jax.jit(gradients(dataclasses.replace(config, remat=policy)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, recomputed
    )


@pytest.mark.parametrize(
    ("policy", "again"),
    [
        ("none", 0),
        ("minimal", 1),  # the scores
        ("attention", 3),  # the scores, gate and up
        ("attention_output", 7),  # query, key, value, scores, out, gate and up
        ("full", 8),  # those and the mixing of values; never down, whose result nothing needs
        ("offload", 8),
    ],
)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_matrix_products_computed_again(policy: str, again: int, scan_layers: bool) -> None:
    """Nine forward, two for each of them backward, and what the policy didn't keep."""
    config = dataclasses.replace(CONFIG, num_layers=1, remat=policy, scan_layers=scan_layers)
    params = nn.unbox(decoder.abstract_params(config))
    program = jax.make_jaxpr(gradients(config))(params)
    products = [one for one in equations(program.jaxpr) if one.primitive.name == "dot_general"]
    assert len(products) == 9 + 2 * 9 + again


@pytest.mark.parametrize("scan_layers", [True, False])
def test_offload_moves_the_blocks_inputs_to_the_host_and_back(scan_layers: bool) -> None:
    config = dataclasses.replace(CONFIG, remat="offload", scan_layers=scan_layers)
    params = nn.unbox(decoder.abstract_params(config))
    # As for a TPU: a CPU's memory is the host's, and there is nothing to lower.
    traced = jax.jit(gradients(config)).trace(params)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    moves = re.findall(r"_xla_buffer_placement = \"(\w+)\".*-> tensor<2x8x16xf32>", text)
    blocks = 1 if scan_layers else config.num_layers  # a scanned block's text is there once
    assert sorted(moves) == ["device"] * blocks + ["pinned_host"] * blocks


def test_numbers_kept_are_those_of_the_table() -> None:
    """remat.py's table, as what a third layer adds to the arrays kept for the backward pass."""
    for policy, numbers in table(CONFIG).items():
        assert numbers_kept(dataclasses.replace(CONFIG, remat=policy)) == numbers, policy


def test_numbers_kept_with_splash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its normaliser too, H numbers, so that nothing needs its forward kernel a second time."""
    interpreted = functools.partial(splash_attention, interpret=True)
    monkeypatch.setattr(attention, "platform_in_context", lambda: "tpu")
    monkeypatch.setattr(attention, "BACKENDS", {**attention.BACKENDS, "splash": interpreted})
    config = dataclasses.replace(CONFIG, head_dim=128)
    for policy, numbers in table(config).items():
        normaliser = 0 if policy == "full" else config.num_heads
        seen = numbers_kept(dataclasses.replace(config, remat=policy), length=128)
        assert seen == numbers + normaliser, policy


def table(config: DecoderConfig) -> dict[str, int]:
    d, hk, f = config.embed_dim, config.num_heads * config.head_width, config.mlp_dim
    return {
        "full": d,
        "attention_output": d + hk,
        "attention": 2 * d + 4 * hk,
        "minimal": 2 * d + 4 * hk + 2 * f,
    }


def numbers_kept(config: DecoderConfig, length: int = 8) -> float:
    """For each token, in one block."""
    deep = dataclasses.replace(config, num_layers=config.num_layers + 1)
    return (kept(deep, length) - kept(config, length)) / (2 * length)


def kept(config: DecoderConfig, length: int) -> int:
    """Numbers in the activations that the backward pass of two rows takes from the forward one."""
    row = [jnp.ones((2, length), jnp.int32)] * 3
    params = nn.unbox(decoder.abstract_params(config))

    def residuals(params: Any) -> Any:
        return jax.vjp(lambda p: Decoder(config).apply({"params": p}, *row), params)[1]

    arrays = jax.tree.leaves(jax.eval_shape(residuals, params))
    weights = sum(x.size for x in jax.tree.leaves(params["layers"]))
    return sum(x.size for x in arrays) - weights


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
