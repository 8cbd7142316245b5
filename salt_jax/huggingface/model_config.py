"""Finds the family of a model, from its config.json or for its DecoderConfig."""

from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface.families import FAMILIES
from salt_jax.huggingface.family import Family
from salt_jax.models.decoder_config import DecoderConfig


def config_from_json(
    settings: Mapping[str, Any], num_ids: int, where: str, families: Sequence[Family] = FAMILIES
) -> tuple[Family, DecoderConfig]:
    """The family and the model that a config.json describes; InputError if the family or a setting
    is not supported. See `Family.read`."""
    model_type = settings.get("model_type")
    for family in families:
        if family.model_type == model_type:
            return family, family.read(settings, num_ids, where)
    raise InputError(
        f"{where} sets model_type to {model_type!r}, expected one of "
        f"{', '.join(family.model_type for family in families)}: add the family by a file of your "
        "own (docs/extending.md), or choose another model."
    )


def config_to_json(
    config: DecoderConfig,
    rows: int,
    dtype: str,
    tokens: Mapping[str, int],
    families: Sequence[Family] = FAMILIES,
) -> tuple[Family, dict[str, Any]]:
    """The first family that can express a model, and the settings of its config.json.

    Args:
        config: the model.
        rows: rows of the exported embedding.
        dtype: dtype of the exported tensors.
        tokens: special token ids by field ("eos_token_id").
        families: the candidates.

    Raises:
        InputError: No family can; names the nearest one, and what it would need.
    """
    obstacles = {family: family.obstacles(config) for family in families}
    family = min(obstacles, key=lambda one: len(obstacles[one]))
    if wrong := obstacles[family]:
        raise InputError(
            f"None of the families {', '.join(one.model_type for one in families)} can express the "
            f"model: the nearest is {family.model_type}, which would need "
            f"DecoderConfig.{', '.join(wrong)}; train a model with those settings."
        )
    return family, family.write(config, rows, dtype, tokens)
