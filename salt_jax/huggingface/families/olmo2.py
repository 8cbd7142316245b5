"""OLMo 2 (arXiv 2501.00656): Llama with norms after attention and MLP, and of queries and keys."""

from salt_jax.huggingface.families import llama, qwen3
from salt_jax.huggingface.family import Family

_NORMS = {
    "model.layers.{layer}.post_attention_layernorm": "attention_out_norm",
    "model.layers.{layer}.post_feedforward_layernorm": "mlp_out_norm",
}

FAMILY = Family(
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    tensors={
        name: path
        for name, path in {**qwen3.TENSORS, **_NORMS}.items()
        if path not in ("attention_norm", "mlp_norm")
    },
    fields={
        **{name: field for name, field in llama.FIELDS.items() if name != "head_dim"},
        "rms_norm_eps": ("norm_epsilon", 1e-5),
    },
    activation="silu",
    fixed={**llama.FIXED, "qk_norm": "heads", "norm_placement": "after", "head_dim": None},
    must_be={"attention_bias": False},
)
