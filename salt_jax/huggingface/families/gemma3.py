"""Gemma 3's text models (arXiv 2503.19786): Gemma 2 with norms of queries and keys instead of soft
caps, and two rotary bases."""

from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface import rotary_fields
from salt_jax.huggingface.families import gemma2
from salt_jax.huggingface.family import value_of
from salt_jax.models.decoder_config import DecoderConfig

_GLOBAL, _LOCAL, _LOCAL_THETA = "full_attention", "sliding_attention", "rope_local_base_freq"


class Gemma3(gemma2.Gemma2):
    """Gemma 3: `rope_parameters` has those of both kinds of layers; older files have
    `rope_local_base_freq` for local ones, which are never scaled."""

    caps: Mapping[str, tuple[str, float | None]] = {
        "final_logit_softcapping": ("logits_soft_cap", None)
    }
    period = 6

    def read(self, settings: Mapping[str, Any], num_ids: int, where: str) -> DecoderConfig:
        if rope := settings.get("rope_parameters"):
            of_kinds: Any = rope if isinstance(rope, dict) else {}
            full, local = of_kinds.get(_GLOBAL), of_kinds.get(_LOCAL)
            scaling = rotary_fields.read_scaling({"rope_parameters": local}, where)
            if not full or not local or scaling is not None:
                raise InputError(
                    f"{where} sets rope_parameters to {rope!r}, expected those of {_GLOBAL} and, "
                    f"without a scaling, of {_LOCAL}: choose another model."
                )
            theta = local.get("rope_theta", settings.get(_LOCAL_THETA))
            settings = {**settings, "rope_parameters": full, _LOCAL_THETA: theta}
        return super().read(settings, num_ids, where)

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        options = super().read_options(settings, where)
        if "window" in options:
            options["local_rope_theta"] = value_of(settings, _LOCAL_THETA, 10_000.0, where)
        return options

    def write(
        self, config: DecoderConfig, rows: int, dtype: str, tokens: Mapping[str, int]
    ) -> dict[str, Any]:
        settings = super().write(config, rows, dtype, tokens)
        theta = config.local_rope_theta or config.rope_theta
        local = {"rope_type": "default", "rope_theta": theta}
        rope = {_GLOBAL: settings["rope_parameters"], _LOCAL: local}
        return {**settings, "rope_parameters": rope, _LOCAL_THETA: theta}

    def obstacles(self, config: DecoderConfig) -> list[str]:
        needs = super().obstacles(config)
        if config.window is not None and config.local_rope_theta is None:
            needs.append("local_rope_theta a number and has None")
        return needs


FAMILY = Gemma3(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    tensors={
        **gemma2.TENSORS,
        "model.layers.{layer}.self_attn.q_norm": "attention/query_norm",
        "model.layers.{layer}.self_attn.k_norm": "attention/key_norm",
    },
    fields={**gemma2.FAMILY.fields, "max_position_embeddings": ("max_length", 131_072)},
    activation="gelu_pytorch_tanh",
    fixed={**gemma2.FAMILY.fixed, "qk_norm": "head"},
    must_be={"attention_bias": False, "attn_logit_softcapping": None},
    theta=1_000_000.0,
    norm_offset=1.0,
    options=(
        *("layer_kinds", "window", "attention_scale", "local_rope_theta"),
        *(setting for setting, _ in Gemma3.caps.values()),
    ),
    option_fields=(
        *(*gemma2.FAMILY.option_fields, _LOCAL_THETA),
        *("sliding_window_pattern", "_sliding_window_pattern"),
    ),
)
