"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288) and SmolLM 1 and 2."""

from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface import tokenizer_classes
from salt_jax.huggingface.family import SIZES, Family
from salt_jax.models.decoder_config import DecoderConfig

TENSORS: Mapping[str, str] = {
    "model.embed_tokens": "embedding",
    "model.layers.{layer}.input_layernorm": "attention_norm",
    "model.layers.{layer}.post_attention_layernorm": "mlp_norm",
    "model.layers.{layer}.self_attn.q_proj": "attention/query",
    "model.layers.{layer}.self_attn.k_proj": "attention/key",
    "model.layers.{layer}.self_attn.v_proj": "attention/value",
    "model.layers.{layer}.self_attn.o_proj": "attention/out",
    "model.layers.{layer}.mlp.gate_proj": "mlp/gate",
    "model.layers.{layer}.mlp.up_proj": "mlp/up",
    "model.layers.{layer}.mlp.down_proj": "mlp/down",
    "model.norm": "final_norm",
    "lm_head": "head",
}
FIELDS: Mapping[str, tuple[str, Any]] = {
    **SIZES,
    "num_key_value_heads": ("num_kv_heads", None),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "head_dim": ("head_dim", None),
    "tie_word_embeddings": ("tied_embeddings", False),
}
FIXED: Mapping[str, Any] = {
    "norm": "rmsnorm",
    "gated_mlp": True,
    "use_bias": False,
    "parallel_residual": False,
    "rope_fraction": 1.0,
    "scale_embeddings": False,
}


class Llama(Family):
    """Llama; transformers requires embed_dim to be a multiple of num_heads."""

    def obstacles(self, config: DecoderConfig) -> list[str]:
        needs = super().obstacles(config)
        if config.embed_dim % config.num_heads:
            needs.append(f"embed_dim a multiple of num_heads and has {config.embed_dim}")
        return needs


def _tokenizer_steps(settings: tokenizer_classes.Settings) -> dict[str, Any]:
    prefix = settings.get("add_prefix_space")
    scheme = "always" if settings.get("legacy") else "first"
    scheme = "never" if prefix is not None and not prefix else scheme
    strip = [] if scheme == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "normalizer": None,
        "pre_tokenizer": {
            **{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        },
        "decoder": {"type": "Sequence", "decoders": [*tokenizer_classes.TO_TEXT, *strip]},
        "model": tokenizer_classes.BYTE_FALLBACK,
    }


FAMILY = Llama(
    model_type="llama",
    class_name="LlamaForCausalLM",
    tensors=TENSORS,
    fields=FIELDS,
    activation="silu",
    fixed=FIXED,
    must_be={"attention_bias": False, "mlp_bias": False},
    # Llama 3's tokenizer has the same class, but is byte-level and read unchanged.
    tokenizer=tokenizer_classes.TokenizerClass(
        "LlamaTokenizer", _tokenizer_steps, ("<unk>", "<s>", "</s>"), reads_bytes=False
    ),
    names_tokenizer=False,
)
