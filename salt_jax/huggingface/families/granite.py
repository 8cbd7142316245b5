"""Granite 3: Llama with multipliers of embeddings, residuals, attention and logits."""

from salt_jax.huggingface.families import llama
from salt_jax.huggingface.family import Family

FAMILY = Family(
    model_type="granite",
    class_name="GraniteForCausalLM",
    tensors=llama.TENSORS,
    fields={
        **{name: field for name, field in llama.FIELDS.items() if name != "head_dim"},
        "embedding_multiplier": ("embedding_multiplier", 1.0),
        "residual_multiplier": ("residual_multiplier", 1.0),
        "attention_multiplier": ("attention_scale", 1.0),
        "logits_scaling": ("logits_divisor", 1.0),
    },
    activation="silu",
    fixed={**llama.FIXED, "head_dim": None},
    must_be={"attention_bias": False, "mlp_bias": False},
)
