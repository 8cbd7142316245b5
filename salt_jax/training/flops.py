"""A model's shape in, floating-point operations per token out; a device's kind in, its peak out.

Model FLOPs, by the convention of PaLM (arXiv 2204.02311, appendix B): what the forward and backward
passes need, matrix products alone (a multiplication and an addition are 2), without what
rematerialisation does twice. With N parameters in matrix products (the head counts, the embedding
look-up does not), L tokens a row, H heads of width K:

    forward   2 · N + 4 · layers · H · K · L     (q·k and the mixing of values: 2 · H · K · L each)
    training  three times that: 6 · N + 12 · layers · H · K · L

Attention is counted over the whole L × L square, as PaLM does and as the reference computes it,
although half is masked.
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


def forward_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward pass with the head: of the teacher, scoring, evaluation."""
    attention = 4 * config.num_layers * config.num_heads * config.head_width * sequence_length
    return float(2 * config.num_matmul_parameters + attention)


def train_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward passes."""
    return 3.0 * forward_flops_per_token(config, sequence_length)


def device_peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 peak of a jax.Device.device_kind, FLOP/s; None if not known.

    The longest known name that the kind begins with decides, so "NVIDIA H100 80GB HBM3" is an H100.
    A CPU has none.
    """
    known = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(known, key=len)] if known else None
