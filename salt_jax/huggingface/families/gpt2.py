"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases, and transposed kernels."""

from collections.abc import Mapping
from typing import Any

from salt_jax.huggingface.family import Family, value_of
from salt_jax.models.decoder_config import DecoderConfig

_LAYER, _ACTIVATION = "transformer.h.{layer}", "activation_function"


class GPT2(Family):
    """GPT-2, whose MLP is four times as wide as the model if `n_inner` is null."""

    def activation_name(self, settings: Mapping[str, Any]) -> Any:
        return settings.get(_ACTIVATION) or self.activation

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        usual = 4 * value_of(settings, "n_embd", 768, where)
        return {"mlp_dim": value_of(settings, "n_inner", usual, where)}

    def write(
        self, config: DecoderConfig, rows: int, dtype: str, tokens: Mapping[str, int]
    ) -> dict[str, Any]:
        settings = super().write(config, rows, dtype, tokens)
        settings |= {_ACTIVATION: settings["hidden_act"], "n_inner": config.mlp_dim}
        rotary = ("hidden_act", "rope_theta", "rope_parameters")
        return {name: value for name, value in settings.items() if name not in rotary}


FAMILY = GPT2(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    tensors={
        "transformer.wte": "embedding",
        "transformer.wpe": "position_embedding",
        f"{_LAYER}.ln_1": "attention_norm",
        f"{_LAYER}.ln_2": "mlp_norm",
        f"{_LAYER}.attn.c_attn": "attention/query + attention/key + attention/value",
        f"{_LAYER}.attn.c_proj": "attention/out",
        f"{_LAYER}.mlp.c_fc": "mlp/up",
        f"{_LAYER}.mlp.c_proj": "mlp/down",
        "transformer.ln_f": "final_norm",
        "lm_head": "head",
    },
    fields={
        "n_embd": ("embed_dim", 768),
        "n_layer": ("num_layers", 12),
        "n_head": ("num_heads", 12),
        "n_positions": ("max_length", 1024),
        "layer_norm_epsilon": ("norm_epsilon", 1e-5),
        "tie_word_embeddings": ("tied_embeddings", True),
    },
    activation="gelu_new",
    fixed={
        **{"norm": "layernorm", "gated_mlp": False, "use_bias": True, "parallel_residual": False},
        **{"learned_positions": True, "rope_fraction": 0.0},
        **{"scale_embeddings": False, "num_kv_heads": None, "head_dim": None},
    },
    rope_fraction=0.0,
    scalings=(),
    transposed=True,
    option_fields=("n_inner", _ACTIVATION),
)
