"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on query, key and value."""

from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface import layer_types
from salt_jax.huggingface.families import llama
from salt_jax.huggingface.family import Family
from salt_jax.models.decoder_config import DecoderConfig


class Qwen(Family):
    """Qwen2 or 3: layers from `max_window_layers` on have a window if `use_sliding_window`."""

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        window, first = None, settings["num_hidden_layers"]
        if settings.get("use_sliding_window"):
            window = settings.get("sliding_window", 4096)
            first = settings.get("max_window_layers", 28) if window is not None else first
        usual = [
            "full_attention" if layer < first else "sliding_attention"
            for layer in range(settings["num_hidden_layers"])
        ]
        return layer_types.read_layers(settings, usual, window, where)

    def write_options(self, config: DecoderConfig) -> dict[str, Any]:
        layers = layer_types.write_layers(config.kinds_of_layers, config.window)
        return {**layers, "use_sliding_window": config.window is not None}

    def obstacles(self, config: DecoderConfig) -> list[str]:
        needs = super().obstacles(config)
        if "nope" in config.layer_kinds:
            needs.append(f"layer_kinds without 'nope' and has {config.layer_kinds!r}")
        return needs


FIELDS: Mapping[str, tuple[str, Any]] = {
    **llama.FIELDS,
    "max_position_embeddings": ("max_length", 32_768),
    "num_key_value_heads": ("num_kv_heads", 32),
}
OPTION_FIELDS = (*layer_types.FIELDS, "use_sliding_window", "max_window_layers")

FAMILY = Qwen(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    tensors=llama.TENSORS,
    fields={name: field for name, field in FIELDS.items() if name != "head_dim"},
    activation="silu",
    fixed={**llama.FIXED, "qkv_bias": True, "head_dim": None},
    options=("layer_kinds", "window"),
    option_fields=OPTION_FIELDS,
)
