"""GPT-NeoX (arXiv 2204.06745) and Pythia: LayerNorm, biases, partial rotary embedding."""

from salt_jax.huggingface import tokenizer_classes
from salt_jax.huggingface.family import SIZES, Family

FAMILY = Family(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    tensors={
        "gpt_neox.embed_in": "embedding",
        "gpt_neox.layers.{layer}.input_layernorm": "attention_norm",
        "gpt_neox.layers.{layer}.post_attention_layernorm": "mlp_norm",
        "gpt_neox.layers.{layer}.attention.query_key_value": (
            "attention/query attention/key attention/value"
        ),
        "gpt_neox.layers.{layer}.attention.dense": "attention/out",
        "gpt_neox.layers.{layer}.mlp.dense_h_to_4h": "mlp/up",
        "gpt_neox.layers.{layer}.mlp.dense_4h_to_h": "mlp/down",
        "gpt_neox.final_layer_norm": "final_norm",
        "embed_out": "head",
    },
    fields={
        **SIZES,
        "layer_norm_eps": ("norm_epsilon", 1e-5),
        "use_parallel_residual": ("parallel_residual", True),
        "tie_word_embeddings": ("tied_embeddings", False),
    },
    activation="gelu",
    fixed={
        "norm": "layernorm",
        "gated_mlp": False,
        "use_bias": True,
        "scale_embeddings": False,
        "num_kv_heads": None,
        "head_dim": None,
    },
    must_be={"attention_bias": True},
    theta_field="rotary_emb_base",
    fraction_field="rotary_pct",
    rope_fraction=0.25,
    tokenizer=tokenizer_classes.TokenizerClass(
        "GPTNeoXTokenizer",
        lambda settings: tokenizer_classes.byte_level(settings) | {"normalizer": {"type": "NFC"}},
    ),
)
