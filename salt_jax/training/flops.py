"""FLOPs per token of a model, and the peak FLOP/s of devices.

Model FLOPs follow PaLM (arXiv 2204.02311, appendix B): the matrix products of the forward and
backward passes (a multiply-add is 2), without recomputation. With N parameters in matrix products
(the head counts, the embedding look-up doesn't), L tokens a row, H heads of width K:

    forward   2 · N + 4 · layers · H · K · L     (q·k and the mixing of values: 2 · H · K · L each)
    training  three times that: 6 · N + 12 · layers · H · K · L

Grouped keys and values make N smaller and leave attention as it is. Attention is counted over the
whole L × L square, as in PaLM and in our reference, although half of it is masked out; in a layer
with a window W < L a token counts W keys instead of L, although our reference computes all.

Hardware FLOPs add what the backward pass of a block recomputes, by remat policy
(`models/remat.py`), for the reference attention:

    none               nothing
    minimal            q·k
    attention          q·k, `up` and `gate`
    attention_output   those, `query`, `key`, `value`, and `out` if the MLP reads its result
    full, offload      all those and the mixing of values: the block's forward pass without `down`,
                       whose result the backward pass doesn't use

With full or offload 6 · N becomes about 8 · N. The head is never recomputed. A fused attention
kernel recomputes q·k under every policy and skips what is masked out: neither is counted.
"""

import types
from collections.abc import Mapping

from salt_jax.models.decoder import DecoderConfig

# Dense bfloat16 peak of one device, FLOP/s, from data sheets, by jax.Device.device_kind.
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

# The products of a block that the backward pass recomputes, by remat policy: "up" includes `gate`,
# "projections" are attention's.
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
    """Model FLOPs of one token's forward pass, head included."""
    attention = 4 * config.num_heads * config.head_width * _keys(config, sequence_length)
    return float(2 * config.num_matmul_parameters + attention)


def train_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Model FLOPs of one token's forward and backward passes, as MFU counts them."""
    return 3.0 * forward_flops_per_token(config, sequence_length)


def hardware_train_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of training on one token with recomputation; unknown remat policies count as "full"."""
    again = _COMPUTED_AGAIN.get(config.remat, _COMPUTED_AGAIN["full"])
    heads = config.embed_dim * config.head_width
    out = 0 if config.parallel_residual else heads * config.num_heads
    attention = config.num_heads * config.head_width * _keys(config, sequence_length)
    up = (2 if config.gated_mlp else 1) * config.embed_dim * config.mlp_dim
    products = {
        "q·k": attention,
        "mixing": attention,
        "up": config.num_layers * up,
        "projections": config.num_layers * (heads * (config.num_heads + 2 * config.kv_heads) + out),
    }
    recomputed = 2.0 * sum(products[name] for name in again)
    return train_flops_per_token(config, sequence_length) + recomputed


def _keys(config: DecoderConfig, sequence_length: int) -> int:
    """The keys that a token counts in attention, over all layers."""
    local = min(config.window or sequence_length, sequence_length)
    return sum(local if kind == "local" else sequence_length for kind in config.kinds_of_layers)


def device_peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 peak of a jax.Device.device_kind, FLOP/s; None if unknown.

    The longest known name that is a prefix of the kind counts: "NVIDIA H100 80GB HBM3" is an H100.
    """
    known = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(known, key=len)] if known else None
