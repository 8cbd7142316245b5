"""The supported model families, one file each."""

from salt_jax.huggingface.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from salt_jax.huggingface.family import Family

FAMILIES: tuple[Family, ...] = (
    *(gpt_neox.FAMILY, llama.FAMILY, gemma.FAMILY),
    *(mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, smollm3.FAMILY, olmo2.FAMILY),
    *(granite.FAMILY, phi3.FAMILY, gemma2.FAMILY, gemma3.FAMILY, gpt2.FAMILY),
)
