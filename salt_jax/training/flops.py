"""A model's shape in, floating-point operations per token out; a device's kind in, its peak out.

Model FLOPs, by the convention of PaLM (arXiv 2204.02311, appendix B): what the forward and backward
passes need, matrix products alone (a multiplication and an addition are 2), without what
rematerialisation does twice. With N parameters in matrix products (the head counts, the embedding
look-up does not), L tokens a row, H heads of width K:

    forward   2 · N + 4 · layers · H · K · L     (q·k and the mixing of values: 2 · H · K · L each)
    training  three times that: 6 · N + 12 · layers · H · K · L

Grouped keys and values make N smaller and leave attention as it is. Attention is counted over the
whole L × L square, as PaLM does and as the reference computes it, although half is masked.

Hardware FLOPs add what the backward pass of a block computes again, by remat policy
(`models/remat.py`), for attention as the reference computes it:

    none               nothing
    minimal            q·k
    attention          q·k, `up` and `gate`
    attention_output   those, `query`, `key`, `value`, and `out` if the MLP reads its result
    full, offload      all those and the mixing of values: the block's forward pass but for `down`,
                       whose result the backward pass has no use for

The last line is what rounds to 8 · N for 6 · N. The head is never computed again. A fused attention
kernel has a q·k of its own in its backward pass under every policy, and skips what is masked:
neither is in these numbers.
"""

import types
from collections.abc import Mapping

from salt_jax.models.decoder import DecoderConfig

# Dense peak of one device in bfloat16, FLOP/s, from the makers' data sheets; keys are
# jax.Device.device_kind.
_PEAK_FLOPS: Mapping[str, float] = types.MappingProxyType(
    {
        "TPU v2": 45e12,
        "TPU v3": 123e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        "NVIDIA A100": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H100": 989e12,
        "NVIDIA H200 NVL": 836e12,
        "NVIDIA H200": 989e12,
    }
)

# The products of a block that the backward pass computes again, by remat policy: "up" counts its
# gate, "projections" are attention's.
_COMPUTED_AGAIN: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "none": (),
        "minimal": ("q·k",),
        "attention": ("q·k", "up"),
        "attention_output": ("q·k", "up", "projections"),
        "full": ("q·k", "up", "projections", "mixing"),
        "offload": ("q·k", "up", "projections", "mixing"),
    }
)


def forward_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward pass with the head: of a teacher, scoring or evaluation."""
    attention = 4 * config.num_layers * config.num_heads * config.head_width * sequence_length
    return float(2 * config.num_matmul_parameters + attention)


def train_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Model FLOPs of one token's forward and backward passes: what MFU counts."""
    return 3.0 * forward_flops_per_token(config, sequence_length)


def hardware_train_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs that a device spends on one token's training, recomputation included.

    A remat policy that is not known here counts as "full", the most that a block can recompute.
    """
    again = _COMPUTED_AGAIN.get(config.remat, _COMPUTED_AGAIN["full"])
    heads = config.embed_dim * config.head_width
    out = 0 if config.parallel_residual else heads * config.num_heads
    products = {
        "q·k": config.num_heads * config.head_width * sequence_length,
        "mixing": config.num_heads * config.head_width * sequence_length,
        "up": (2 if config.gated_mlp else 1) * config.embed_dim * config.mlp_dim,
        "projections": heads * (config.num_heads + 2 * config.kv_heads) + out,
    }
    recomputed = 2.0 * config.num_layers * sum(products[name] for name in again)
    return train_flops_per_token(config, sequence_length) + recomputed


def device_peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 peak of a jax.Device.device_kind, FLOP/s; None if not known.

    The longest known name that the kind begins with decides, so "NVIDIA H100 80GB HBM3" is an H100.
    A CPU has none.
    """
    known = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(known, key=len)] if known else None
