"""Gemma 2 (arXiv 2408.00118): Gemma with four norms a block, soft caps, and local layers."""

from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface import layer_types
from salt_jax.huggingface.families import gemma, llama
from salt_jax.huggingface.family import value_of
from salt_jax.models.decoder_config import DecoderConfig


class Gemma2(llama.Llama):
    """Gemma 2: `query_pre_attn_scalar` is the inverse square of attention's scale, and a soft cap
    is off if it is null, but has a default if it is missing."""

    caps: Mapping[str, tuple[str, float | None]] = {
        "attn_logit_softcapping": ("attention_soft_cap", 50.0),
        "final_logit_softcapping": ("logits_soft_cap", 30.0),
    }
    period = 2  # layers of which, by default, the last alone has full attention

    def activation_name(self, settings: Mapping[str, Any]) -> Any:
        return settings.get("hidden_activation") or self.activation

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        scalar = value_of(settings, "query_pre_attn_scalar", 256, where)
        options: dict[str, Any] = {}
        if scalar != settings.get("head_dim", 256):
            options["attention_scale"] = scalar**-0.5 if scalar > 0 else 0.0
        for field, (setting, default) in self.caps.items():
            if settings.get(field, default) is not None:
                options[setting] = value_of(settings, field, default or 0.0, where)
        period = value_of(settings, "sliding_window_pattern", self.period, where) or 1
        usual = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(settings["num_hidden_layers"])
        ]
        window = settings.get("sliding_window", 4096)
        return options | layer_types.read_layers(settings, usual, window, where)

    def write(
        self, config: DecoderConfig, rows: int, dtype: str, tokens: Mapping[str, int]
    ) -> dict[str, Any]:
        settings = super().write(config, rows, dtype, tokens)
        return {**settings, "hidden_activation": settings["hidden_act"]}

    def write_options(self, config: DecoderConfig) -> dict[str, Any]:
        # transformers needs a window even where no layer has it.
        window = config.window or config.max_length
        return {
            **layer_types.write_layers(config.kinds_of_layers, window),
            **{field: getattr(config, setting) for field, (setting, _) in self.caps.items()},
            "query_pre_attn_scalar": round(_scalar(config)),
        }

    def obstacles(self, config: DecoderConfig) -> list[str]:
        needs, scalar = super().obstacles(config), _scalar(config)
        if abs(scalar - round(scalar)) > 1e-6 * scalar:
            needs.append(
                f"attention_scale = 1 / √n with a whole n and has {config.attention_scale!r}"
            )
        if "nope" in config.layer_kinds:
            needs.append(f"layer_kinds without 'nope' and has {config.layer_kinds!r}")
        return needs


def _scalar(config: DecoderConfig) -> float:
    scale = config.attention_scale
    return config.head_width if scale is None else scale**-2


_LAYER = "model.layers.{layer}"
TENSORS: Mapping[str, str] = {
    **llama.TENSORS,
    f"{_LAYER}.post_attention_layernorm": "attention_out_norm",
    f"{_LAYER}.pre_feedforward_layernorm": "mlp_norm",
    f"{_LAYER}.post_feedforward_layernorm": "mlp_out_norm",
}

FAMILY = Gemma2(
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    tensors=TENSORS,
    fields={**gemma.FAMILY.fields, "num_key_value_heads": ("num_kv_heads", 4)},
    activation="gelu_pytorch_tanh",
    fixed={**gemma.FAMILY.fixed, "norm_placement": "both"},
    must_be={"attention_bias": False},
    norm_offset=1.0,
    options=(
        *("layer_kinds", "window", "attention_scale"),
        *(setting for setting, _ in Gemma2.caps.values()),
    ),
    option_fields=(*layer_types.FIELDS, *Gemma2.caps, "query_pre_attn_scalar"),
)
