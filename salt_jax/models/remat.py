"""Rematerialisation policies: what a block saves for the backward pass, which recomputes the rest.

Numbers saved per token and block (H = G, a gated MLP), and their bfloat16 bytes in
llm_2_8b.gin (D 2048, H · K 2048, F 8192):

    "none"              everything
    "minimal"           2 D + 4 H · K + 2 F   56 KiB   products with parameters, attention's output
    "attention"         2 D + 4 H · K         24 KiB   attention's projections and output
    "attention_output"  D + H · K              8 KiB   attention's output: its kernel runs once
    "full"              D                      4 KiB   the block's input
    "offload"           D on the host          0 KiB   the same, in the host's memory

Flash kernels also save their softmax's normaliser, H numbers in float32, with attention's output.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from salt_jax.models.reference_attention import OUTPUT_NAME

# Names of a block's arrays, for jax.ad_checkpoint.checkpoint_name.
BLOCK_INPUT = "block_input"
QUERY, KEY, VALUE = "query", "key", "value"
ATTENDED = "attended"

_policies = jax.checkpoint_policies

Policy = Callable[..., Any]


def _cudnn_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves cuDNN's output and normaliser, which checkpoint_name can't reach."""
    return str(primitive) == "dot_product_attention_fwd_wrapper"


_attention_output = _policies.save_from_both_policies(
    _policies.save_only_these_names(OUTPUT_NAME), _cudnn_kernel
)

POLICIES: Mapping[str, Policy] = types.MappingProxyType(
    {
        "minimal": _policies.save_from_both_policies(
            _policies.dots_with_no_batch_dims_saveable, _attention_output
        ),
        "attention": _policies.save_from_both_policies(
            _policies.save_only_these_names(QUERY, KEY, VALUE, ATTENDED), _attention_output
        ),
        "attention_output": _attention_output,
        "full": _policies.nothing_saveable,
        "offload": _policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
)
