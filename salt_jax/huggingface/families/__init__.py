"""The supported model families, one file each."""

from salt_jax.huggingface.families import gemma, gpt_neox, llama
from salt_jax.huggingface.family import Family

FAMILIES: tuple[Family, ...] = (gpt_neox.FAMILY, llama.FAMILY, gemma.FAMILY)
