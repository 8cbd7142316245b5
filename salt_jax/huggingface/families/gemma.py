"""Gemma 1 (arXiv 2403.08295): Llama with scaled embeddings, and norm scales stored minus 1."""

from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface import tokenizer_classes
from salt_jax.huggingface.families import llama
from salt_jax.huggingface.family import Family
from salt_jax.models.decoder_config import DecoderConfig


class Gemma(Family):
    """Gemma, for which transformers reads "gelu" as its approximation, "gelu_pytorch_tanh"."""

    def activation_name(self, settings: Mapping[str, Any]) -> Any:
        name = super().activation_name(settings)
        return self.activation if name == "gelu" else name

    def obstacles(self, config: DecoderConfig) -> list[str]:
        needs = super().obstacles(config)
        if config.mlp_activation == "gelu":
            needs.append("mlp_activation = 'gelu_tanh' and has 'gelu'")
        return needs

    def write(
        self, config: DecoderConfig, rows: int, dtype: str, tokens: Mapping[str, int]
    ) -> dict[str, Any]:
        settings = super().write(config, rows, dtype, tokens)
        return {**settings, "hidden_activation": settings["hidden_act"]}


def _tokenizer_steps(settings: tokenizer_classes.Settings) -> dict[str, Any]:
    space: dict[str, Any] = {"pattern": {"String": " "}}
    split = {"type": "Split", **space, "behavior": "MergedWithPrevious", "invert": False}
    unknown = tokenizer_classes.token_text(settings.get("unk_token")) or "<unk>"
    return {
        "normalizer": {"type": "Replace", **space, "content": "▁"},
        "pre_tokenizer": split,
        "decoder": {"type": "Sequence", "decoders": tokenizer_classes.TO_TEXT},
        "model": {**tokenizer_classes.BYTE_FALLBACK, "unk_token": unknown},
    }


FAMILY = Gemma(
    model_type="gemma",
    class_name="GemmaForCausalLM",
    tensors=llama.TENSORS,
    fields={
        **llama.FIELDS,
        "max_position_embeddings": ("max_length", 8192),
        "num_key_value_heads": ("num_kv_heads", 16),
        "head_dim": ("head_dim", 256),
        "tie_word_embeddings": ("tied_embeddings", True),
    },
    activation="gelu_pytorch_tanh",
    fixed={**llama.FIXED, "scale_embeddings": True},
    must_be={"attention_bias": False},
    norm_offset=1.0,
    tokenizer=tokenizer_classes.TokenizerClass("GemmaTokenizer", _tokenizer_steps, ("<unk>",)),
)
