"""The FLOP formulas against what XLA counts for the compiled model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from salt_jax.models import decoder, remat
from salt_jax.models.decoder import Decoder, DecoderConfig
from salt_jax.training import flops

BATCH = 2
# XLA also counts norms, softmax, rotations and activations, the formulas matrix products alone.
TOLERANCE = 0.03
# Wide enough that products outweigh everything else, as they do at real sizes; no scan, whose body
# XLA counts once.
TIED = DecoderConfig(
    embed_dim=256, num_layers=2, num_heads=4, mlp_dim=768, vocab_size=1024, scan_layers=False
)
VARIANTS = {
    "tied": TIED,
    "untied": dataclasses.replace(TIED, tied_embeddings=False, num_layers=3),
    "grouped": dataclasses.replace(TIED, num_kv_heads=1, head_dim=96),
    "plain": dataclasses.replace(TIED, gated_mlp=False, mlp_activation="relu"),
    "gpt_neox": dataclasses.replace(
        TIED,
        **{"tied_embeddings": False, "gated_mlp": False, "norm": "layernorm", "use_bias": True},
        **{"parallel_residual": True, "rope_fraction": 0.25, "vocab_size": 1000},
    ),
}
MODELS = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
LENGTHS = pytest.mark.parametrize("length", [64, 512])


@functools.cache
def counted_by_xla(
    config: DecoderConfig, length: int, train: bool, teacher: DecoderConfig | None = None
) -> float:
    """FLOPs per token of a forward pass, or of a gradient, beside a teacher's forward pass."""
    tokens = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
    params = [decoder.nn.unbox(decoder.abstract_params(c)) for c in (config, teacher) if c]

    def log_p(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
        hidden = Decoder(config).apply({"params": params}, tokens, tokens, tokens)
        head = decoder.head_kernel(params, config)
        return jax.nn.log_softmax(decoder.logits(hidden, head, config))

    def loss(student: Any, rest: Any, tokens: jax.Array) -> jax.Array:
        soft = jnp.exp(log_p(teacher, rest[0], tokens)) if teacher else 1.0
        return jnp.sum(soft * log_p(config, student, tokens))

    program = jax.jit(jax.grad(loss) if train else loss)
    counted = program.lower(params[0], params[1:], tokens).cost_analysis()["flops"]
    return float(counted) / (BATCH * length)


@MODELS
@LENGTHS
def test_forward_agrees_with_xla(config: DecoderConfig, length: int) -> None:
    formula = flops.forward_flops_per_token(config, length)
    assert counted_by_xla(config, length, train=False) == pytest.approx(formula, rel=TOLERANCE)


@MODELS
@LENGTHS
def test_training_agrees_with_xla(config: DecoderConfig, length: int) -> None:
    formula = flops.train_flops_per_token(config, length)
    assert counted_by_xla(config, length, train=True) == pytest.approx(formula, rel=TOLERANCE)
    assert flops.hardware_train_flops_per_token(config, length) == formula


@pytest.mark.parametrize(
    "count", [flops.forward_flops_per_token, flops.hardware_train_flops_per_token]
)
def test_a_layer_with_a_window_counts_as_one_of_shorter_rows(count: Any) -> None:
    """Of 6 layers 4 are local; a row shorter than the window has none."""
    plain = dataclasses.replace(TIED, num_layers=6, remat="full")
    kinds = {"layer_kinds": ("local", "local", "global"), "window": 48}
    local = dataclasses.replace(plain, **kinds)
    mean = (4 * count(plain, 48) + 2 * count(plain, 512)) / 6
    assert count(local, 512) == pytest.approx(mean, rel=1e-12)
    assert count(local, 40) == count(plain, 40)


@MODELS
def test_a_teacher_adds_its_forward_pass(config: DecoderConfig) -> None:
    teacher = dataclasses.replace(TIED, embed_dim=192, mlp_dim=512)
    alone = counted_by_xla(config, 128, train=True)
    added = counted_by_xla(config, 128, train=True, teacher=teacher) - alone
    assert added == pytest.approx(flops.forward_flops_per_token(teacher, 128), rel=TOLERANCE)


@MODELS
@pytest.mark.parametrize("policy", remat.POLICIES)
def test_recomputation_agrees_with_xla(config: DecoderConfig, policy: str) -> None:
    """What a policy adds to the count, not the sum, in which it would be lost."""
    length = 512
    rematerialised = dataclasses.replace(config, remat=policy)
    alone = counted_by_xla(config, length, train=True)
    added = counted_by_xla(rematerialised, length, train=True) - alone
    hardware = flops.hardware_train_flops_per_token(rematerialised, length)
    formula = hardware - flops.train_flops_per_token(config, length)
    # Attention's softmax is computed again, too: a dozen operations for each of its weights.
    softmax = 12 * config.num_layers * config.num_heads * length
    assert added == pytest.approx(formula, rel=TOLERANCE, abs=softmax)


def test_a_policy_that_is_not_known_counts_as_full() -> None:
    full = dataclasses.replace(TIED, remat="full")
    new = dataclasses.replace(TIED)
    object.__setattr__(new, "remat", "a policy of tomorrow")
    counted = flops.hardware_train_flops_per_token(new, 64)
    assert counted == flops.hardware_train_flops_per_token(full, 64)


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
