"""SmolLM3: Llama with layers that have no rotary embedding (arXiv 2501.18795)."""

from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface.families import llama
from salt_jax.huggingface.family import Family
from salt_jax.models.decoder_config import DecoderConfig


class SmolLM3(Family):
    """SmolLM3, whose `no_rope_layers` has a 0 for each layer without rotary embedding."""

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        layers = settings["num_hidden_layers"]
        interval = settings.get("no_rope_layer_interval", 4)
        rotated = settings.get("no_rope_layers")
        if rotated is None and isinstance(interval, int) and interval > 0:
            rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
        flags = rotated if isinstance(rotated, list) else []
        if len(flags) != layers or not all(one in (0, 1) for one in flags):
            raise InputError(
                f"{where} sets no_rope_layers to {rotated!r}, expected 1 or 0 for each of {layers} "
                "layers: download the folder again."
            )
        return {"layer_kinds": tuple("global" if one else "nope" for one in flags)}

    def write_options(self, config: DecoderConfig) -> dict[str, Any]:
        rotated = [int(kind == "global") for kind in config.kinds_of_layers]
        # By default the padding is an id of SmolLM3's own vocabulary.
        return {"no_rope_layers": rotated, "pad_token_id": None}


FAMILY = SmolLM3(
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    tensors=llama.TENSORS,
    fields={
        **{name: field for name, field in llama.FIELDS.items() if name != "head_dim"},
        "max_position_embeddings": ("max_length", 32_768),
        "num_key_value_heads": ("num_kv_heads", 4),
        "tie_word_embeddings": ("tied_embeddings", True),
    },
    activation="silu",
    fixed={**llama.FIXED, "head_dim": None, "window": None},
    must_be={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    theta=2_000_000.0,
    options=("layer_kinds",),
    option_fields=("no_rope_layers", "no_rope_layer_interval"),
)
