"""Mistral (arXiv 2310.06825): Llama, in some releases with a window in all layers."""

from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface import layer_types
from salt_jax.huggingface.families import llama
from salt_jax.huggingface.family import Family
from salt_jax.models.decoder_config import DecoderConfig


class Mistral(Family):
    """Mistral, whose `sliding_window` is that of every layer, and null for full attention."""

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        window = settings.get("sliding_window", 4096)
        kind = "full_attention" if window is None else "sliding_attention"
        usual = [kind] * settings["num_hidden_layers"]
        if settings.get("layer_types") not in (None, usual):
            raise InputError(
                f"{where} sets layer_types to {settings['layer_types']!r} and sliding_window to "
                f"{window!r}, and {self.model_type} has layers of one kind: choose another model."
            )
        return layer_types.read_layers(settings, usual, window, where)

    def write_options(self, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.window}

    def obstacles(self, config: DecoderConfig) -> list[str]:
        needs = super().obstacles(config)
        if len(config.layer_kinds) > 1 or config.layer_kinds == ("nope",):
            needs.append(f"layer_kinds of one kind and has {config.layer_kinds!r}")
        return needs


FAMILY = Mistral(
    model_type="mistral",
    class_name="MistralForCausalLM",
    tensors=llama.TENSORS,
    fields={
        **llama.FIELDS,
        "max_position_embeddings": ("max_length", 131_072),
        "num_key_value_heads": ("num_kv_heads", 8),
    },
    activation="silu",
    fixed=llama.FIXED,
    options=("layer_kinds", "window"),
    option_fields=layer_types.FIELDS,
)
