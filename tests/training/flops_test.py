"""The FLOP formulas against what XLA counts for the compiled model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from salt_jax.distill import losses
from salt_jax.models import decoder
from salt_jax.models.decoder import Decoder, DecoderConfig
from salt_jax.training import flops

BATCH = 2
# Wide enough that products outweigh everything else, as they do at real sizes; no scan, whose body
# XLA counts once.
TIED = DecoderConfig(
    embed_dim=256, num_layers=2, num_heads=4, mlp_dim=768, vocab_size=1024, scan_layers=False
)
UNTIED = dataclasses.replace(
    TIED, tied_embeddings=False, gated_mlp=False, num_kv_heads=2, head_dim=96, num_layers=3
)
MODELS = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
LENGTHS = pytest.mark.parametrize("length", [64, 512])


def counted_by_xla(config: DecoderConfig, length: int, train: bool) -> float:
    tokens = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
    params = decoder.nn.unbox(decoder.abstract_params(config))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        hidden = Decoder(config).apply({"params": params}, tokens, tokens, tokens)
        head = decoder.head_kernel(params, config)
        weights = jnp.ones(tokens.shape)
        loss_config = losses.LossConfig()
        return losses.loss_from_hidden(hidden, head, tokens, weights, 0.0, loss_config, 1024)[0]

    lowered = jax.jit(jax.grad(loss) if train else loss).lower(params, tokens)
    return float(lowered.cost_analysis()["flops"])


@MODELS
@LENGTHS
def test_forward_agrees_with_xla(config: DecoderConfig, length: int) -> None:
    formula = flops.forward_flops_per_token(config, length) * BATCH * length
    assert counted_by_xla(config, length, train=False) == pytest.approx(formula, rel=0.05)


@MODELS
@LENGTHS
def test_training_agrees_with_xla(config: DecoderConfig, length: int) -> None:
    formula = flops.train_flops_per_token(config, length) * BATCH * length
    assert counted_by_xla(config, length, train=True) == pytest.approx(formula, rel=0.05)


def test_palm_formula() -> None:
    """6N + 12 · layers · heads · head width · length, the head in N and the look-up not."""
    kernels = TIED.num_layers * (4 * 256 * 256 + 3 * 256 * 768) + 256 * 1024
    attention = 12 * TIED.num_layers * 256 * 100
    assert flops.train_flops_per_token(TIED, 100) == 6 * kernels + attention
    assert flops.forward_flops_per_token(TIED, 100) == 2 * kernels + attention / 3


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind: str, peak: float | None) -> None:
    assert flops.device_peak_flops(kind) == peak
