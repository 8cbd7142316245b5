"""Phi 3 and 4 (arXiv 2404.14219): Mistral with fused tensors and, in some, partial rotation."""

from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface import layer_types
from salt_jax.huggingface.families import llama, mistral
from salt_jax.models.decoder_config import DecoderConfig

_ATTENTION, _MLP = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"


class Phi3(mistral.Mistral):
    """Phi 3, whose `sliding_window` is null by default."""

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        return super().read_options({"sliding_window": None, **settings}, where)

    def write_options(self, config: DecoderConfig) -> dict[str, Any]:
        # By default the padding is an id of Phi 3's own vocabulary, and this length Phi 3's own.
        scaling = config.rope_scaling
        original = config.max_length if scaling is None else scaling.original_length
        return {
            **super().write_options(config),
            "pad_token_id": None,
            "original_max_position_embeddings": original,
        }


FAMILY = Phi3(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    tensors={
        **{
            name: path
            for name, path in llama.TENSORS.items()
            if not name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        },
        f"{_ATTENTION}.qkv_proj": "attention/query + attention/key + attention/value",
        f"{_MLP}.gate_up_proj": "mlp/gate + mlp/up",
    },
    fields={
        **{name: field for name, field in llama.FIELDS.items() if name != "head_dim"},
        "max_position_embeddings": ("max_length", 4096),
        "rms_norm_eps": ("norm_epsilon", 1e-5),
    },
    activation="silu",
    fixed={
        **{name: value for name, value in llama.FIXED.items() if name != "rope_fraction"},
        "head_dim": None,
    },
    must_be={"attention_bias": False},
    fraction_field="partial_rotary_factor",
    scalings=("longrope",),
    options=("layer_kinds", "window"),
    # The code that auto_map names, published before transformers had this family, is the same.
    option_fields=(*layer_types.FIELDS, "auto_map"),
)
