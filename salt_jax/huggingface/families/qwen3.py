"""Qwen3 (arXiv 2505.09388): Llama with norms of each head's query and key."""

from salt_jax.huggingface.families import llama, qwen2

TENSORS = {
    **llama.TENSORS,
    "model.layers.{layer}.self_attn.q_norm": "attention/query_norm",
    "model.layers.{layer}.self_attn.k_norm": "attention/key_norm",
}

FAMILY = qwen2.Qwen(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    tensors=TENSORS,
    fields={**qwen2.FIELDS, "head_dim": ("head_dim", 128)},
    activation="silu",
    fixed={**llama.FIXED, "qk_norm": "head"},
    must_be={"attention_bias": False},
    options=("layer_kinds", "window"),
    option_fields=qwen2.OPTION_FIELDS,
)
