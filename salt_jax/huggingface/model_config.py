"""Hugging Face's config.json as a DecoderConfig, and back.

In: the settings of a config.json. Out: the architecture and the DecoderConfig that compute the
same, or an error that names what salt_jax can't do; and from a DecoderConfig the settings of a
config.json of the architecture that can express it. A setting that might change what a model
computes is never passed over (huggingface_fields.py). Where the tensors are is
huggingface_tensors.py's part.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface.config_fields import other_computations, unknown_fields
from salt_jax.huggingface.tensors import Rule, gpt_neox_rules, llama_rules
from salt_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """A family of Hugging Face's models.

    Attributes:
        model_type: its name in config.json.
        class_name: transformers' class.
        fields: config.json's fields that a setting of DecoderConfig is equal to, and what
            transformers takes where a field is left out; ... where it can't be.
        activation: what transformers takes where config.json doesn't say.
        rope_fraction: the same of the share of a head that is turned.
        theta_field: what versions before 5 call the base of the rotary wavelengths.
        fixed: what a DecoderConfig of this family must be.
        must_be: fields of config.json that salt_jax knows one value of.
        rules: its tensors.
    """

    model_type: str
    class_name: str
    fields: Mapping[str, tuple[str, Any]]
    activation: str
    rope_fraction: float
    theta_field: str
    fixed: Mapping[str, Any]
    must_be: Mapping[str, Any]
    rules: Callable[[DecoderConfig], list[Rule]]

    @property
    def read(self) -> set[str]:
        """config.json's fields that are read."""
        return {
            *(*self.fields, *self.must_be, self.theta_field, *_ROPE_FIELDS),
            *("hidden_act", _OTHER_ACTIVATION),
            *(("rotary_pct",) if self.model_type == "gpt_neox" else ()),
        }


_SIZES: Mapping[str, tuple[str, Any]] = {
    "hidden_size": ("embed_dim", ...),
    "num_hidden_layers": ("num_layers", ...),
    "num_attention_heads": ("num_heads", ...),
    "intermediate_size": ("mlp_dim", ...),
    "max_position_embeddings": ("max_length", 2048),
}
_LLAMA_SIZES: Mapping[str, tuple[str, Any]] = {
    **_SIZES,
    "num_key_value_heads": ("num_kv_heads", None),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
}
_LLAMA_FIXED = {
    "norm": "rmsnorm",
    "gated_mlp": True,
    "use_bias": False,
    "parallel_residual": False,
    "rope_fraction": 1.0,
}

_GPT_NEOX = Architecture(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    fields={
        **_SIZES,
        "layer_norm_eps": ("norm_epsilon", 1e-5),
        "use_parallel_residual": ("parallel_residual", True),
        "tie_word_embeddings": ("tied_embeddings", False),
    },
    activation="gelu",
    rope_fraction=0.25,
    theta_field="rotary_emb_base",
    fixed={
        "norm": "layernorm",
        "gated_mlp": False,
        "use_bias": True,
        "scale_embeddings": False,
        "num_kv_heads": None,
        "head_dim": None,
    },
    must_be={"attention_bias": True},
    rules=gpt_neox_rules,
)
_LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    fields={
        **_LLAMA_SIZES,
        "head_dim": ("head_dim", None),
        "tie_word_embeddings": ("tied_embeddings", False),
    },
    activation="silu",
    rope_fraction=1.0,
    theta_field="rope_theta",
    fixed={**_LLAMA_FIXED, "scale_embeddings": False},
    must_be={"attention_bias": False, "mlp_bias": False},
    rules=llama_rules,
)
_GEMMA = Architecture(
    model_type="gemma",
    class_name="GemmaForCausalLM",
    fields={
        **_LLAMA_SIZES,
        "max_position_embeddings": ("max_length", 8192),
        "num_key_value_heads": ("num_kv_heads", 16),
        "head_dim": ("head_dim", 256),
        "tie_word_embeddings": ("tied_embeddings", True),
    },
    activation="gelu_pytorch_tanh",
    rope_fraction=1.0,
    theta_field="rope_theta",
    fixed={**_LLAMA_FIXED, "scale_embeddings": True},
    must_be={"attention_bias": False},
    rules=functools.partial(llama_rules, less_one=True),
)
ARCHITECTURES: Mapping[str, Architecture] = types.MappingProxyType(
    {known.model_type: known for known in (_GPT_NEOX, _LLAMA, _GEMMA)}
)

_OTHER_ACTIVATION = "hidden_activation"
_ROPE_FIELDS = ("rope_scaling", "rope_parameters")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def config_from_json(
    settings: Mapping[str, Any], num_ids: int, where: str
) -> tuple[Architecture, DecoderConfig]:
    """The architecture and the model that a config.json describes, in float32.

    Args:
        settings: of the config.json.
        num_ids: how many the tokenizer has; the embedding may have more rows.
        where: the file, for errors.

    Raises:
        InputError: An architecture, or a setting, that salt_jax doesn't have.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(
            f"{where} sets model_type to {model_type!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}: salt_jax has no other architecture."
        )
    architecture = ARCHITECTURES[model_type]
    _refuse_other_values(architecture, settings, where)
    found = {
        setting: _value(settings, field, default, where)
        for field, (setting, default) in architecture.fields.items()
    }
    theta, fraction = _rotary(architecture, settings, where)
    activation = _activation(architecture, settings, where)
    rows = _value(settings, "vocab_size", ..., where)
    if rows < num_ids:
        raise InputError(
            f"{where} sets vocab_size to {rows} and the tokenizer has {num_ids} ids: it is another "
            "model's tokenizer; download the folder again."
        )
    try:
        config = DecoderConfig(
            **{
                **architecture.fixed,
                **found,
                "mlp_activation": activation,
                "rope_theta": theta,
                "rope_fraction": fraction,
                "vocab_size": num_ids,
                "vocab_multiple": vocab_multiple(num_ids, rows),
            }
        )
    except InputError as error:
        raise InputError(f"{where} describes no model of salt_jax's: {error}") from error
    # Said once, so that equal models have equal configs.
    if config.kv_heads == config.num_heads:
        config = dataclasses.replace(config, num_kv_heads=None)
    if config.head_width * config.num_heads == config.embed_dim:
        config = dataclasses.replace(config, head_dim=None)
    _refuse_other_computations(architecture, settings, config, where)
    return architecture, config


def unread_fields(architecture: Architecture, settings: Mapping[str, Any]) -> list[str]:
    """The fields that a config.json sets and that nothing reads, here as in transformers 5.

    The usual ones are left out: token ids, dropout, settings of generation.
    """
    fields = unknown_fields(settings, architecture.read)
    # transformers 5 reads hidden_act alone; older versions read this of a Gemma.
    other, activation = settings.get(_OTHER_ACTIVATION), _activation(architecture, settings, "")
    if other is not None and _ACTIVATIONS.get(str(other)) != activation:
        fields.append(_OTHER_ACTIVATION)
    return fields


def config_to_json(
    config: DecoderConfig, rows: int, dtype: str, tokens: Mapping[str, int]
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that can express a model, and the settings of its config.json.

    Args:
        config: the model.
        rows: of the embedding that is written.
        dtype: of the tensors that are written.
        tokens: ids by field, "eos_token_id" for one.

    Raises:
        InputError: None can; the nearest one, and what it would need.
    """
    obstacles = {known: _obstacles(known, config) for known in ARCHITECTURES.values()}
    architecture = min(obstacles, key=lambda known: len(obstacles[known]))
    if wrong := obstacles[architecture]:
        raise InputError(
            f"No architecture of {', '.join(ARCHITECTURES)} can express the model: the nearest is "
            f"{architecture.model_type}, which would need DecoderConfig.{', '.join(wrong)}; train "
            "a model with those settings."
        )
    values = {**vars(config), "num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    settings: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **{field: values[setting] for field, (setting, _) in architecture.fields.items()},
        **{field: value for field, value in architecture.must_be.items() if value is not None},
        "hidden_act": _activation_name(config),
        # Both as versions before 5 of transformers have it and as later ones do.
        architecture.theta_field: config.rope_theta,
        "rope_parameters": rope,
        "vocab_size": rows,
        "torch_dtype": dtype,
        **tokens,
    }
    if architecture is _GPT_NEOX:
        settings["rotary_pct"] = rope["partial_rotary_factor"] = config.rope_fraction
    if architecture is _GEMMA:
        settings["hidden_activation"] = settings["hidden_act"]
    return architecture, settings


def vocab_multiple(num_ids: int, rows: int) -> int:
    """A multiple to which num_ids rounded up is `rows`: the largest power of two, or `rows`."""
    powers = (1 << exponent for exponent in reversed(range(rows.bit_length())))
    return next((power for power in powers if -(-num_ids // power) * power == rows), rows)


def _obstacles(architecture: Architecture, config: DecoderConfig) -> list[str]:
    """What a model would have to set to be of an architecture."""
    values = {**vars(config)}
    if config.kv_heads == config.num_heads:
        values["num_kv_heads"] = None
    if config.head_width * config.num_heads == config.embed_dim:
        values["head_dim"] = None
    needs = [
        f"{name} = {needed!r} and has {values[name]!r}"
        for name, needed in architecture.fixed.items()
        if values[name] != needed
    ]
    if architecture is _LLAMA and config.embed_dim % config.num_heads:
        needs.append(f"embed_dim a multiple of num_heads and has {config.embed_dim}")
    if architecture is _GEMMA and config.mlp_activation == "gelu":
        # transformers takes gelu in a Gemma to mean its approximation.
        needs.append("mlp_activation = 'gelu_tanh' and has 'gelu'")
    return needs


def _refuse_other_values(
    architecture: Architecture, settings: Mapping[str, Any], where: str
) -> None:
    for field, needed in architecture.must_be.items():
        if settings.get(field, needed) not in (needed, None):
            raise InputError(
                f"{where} sets {field} to {settings[field]!r}, and salt_jax has "
                f"{architecture.model_type} with {needed!r} alone: take another model."
            )


def _refuse_other_computations(
    architecture: Architecture, settings: Mapping[str, Any], config: DecoderConfig, where: str
) -> None:
    for field in other_computations(settings, architecture.read, config):
        raise InputError(
            f"{where} sets {field} to {settings[field]!r}, which salt_jax doesn't have for "
            f"{architecture.model_type}: take another model, or delete the setting if you know "
            "that the logits don't depend on it."
        )


def _rotary(
    architecture: Architecture, settings: Mapping[str, Any], where: str
) -> tuple[float, float]:
    """Base of the wavelengths, and the share of a head that is turned."""
    for field in _ROPE_FIELDS:
        found = settings.get(field) or {}
        kind = found.get("rope_type", found.get("type", "default")) if _is_dict(found) else None
        if kind != "default" and not (kind == "linear" and found.get("factor") == 1):
            raise InputError(
                f"{where} sets {field} to {settings[field]!r}, and salt_jax has no scaled rotary "
                "embedding: take another model."
            )
    # As transformers 5 has it, which reads one of the two.
    rope: dict[str, Any]
    rope = next((settings[field] for field in _ROPE_FIELDS if settings.get(field)), {})
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = [
        field
        for field in sorted(rope.keys() - known - {"original_max_position_embeddings"})
        if rope[field] is not None and not (field == "factor" and rope[field] == 1)
    ]
    if unknown:
        raise InputError(
            f"{where} sets {unknown[0]} of the rotary embedding, which salt_jax doesn't have: take "
            "another model."
        )
    theta = float(_value(settings, architecture.theta_field, 10_000.0, where))
    fraction = architecture.rope_fraction
    if architecture is _GPT_NEOX:
        fraction = float(_value(settings, "rotary_pct", fraction, where))
    theta = float(_value(rope, "rope_theta", theta, where))
    fraction = float(_value(rope, "partial_rotary_factor", fraction, where))
    if fraction != architecture.fixed.get("rope_fraction", fraction):
        raise InputError(
            f"{where} sets partial_rotary_factor to {fraction}, and {architecture.model_type} "
            "turns whole heads: take another model."
        )
    return theta, fraction


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _activation(architecture: Architecture, settings: Mapping[str, Any], where: str) -> str:
    name = settings.get("hidden_act") or architecture.activation
    if architecture is _GEMMA and name == "gelu":
        name = "gelu_pytorch_tanh"  # which Gemma's first files mean by it
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(
            f"{where} sets hidden_act to {name!r}, expected one of {', '.join(_ACTIVATIONS)}: "
            "take another model."
        )
    return _ACTIVATIONS[name]


def _activation_name(config: DecoderConfig) -> str:
    return next(name for name, ours in _ACTIVATIONS.items() if ours == config.mlp_activation)


def _value(settings: Mapping[str, Any], field: str, default: Any, where: str) -> Any:
    """A field that must be a number or a truth value, of the kind that its default is."""
    value = settings.get(field)
    if value is None and default is not ...:
        return default
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (int,)
    if isinstance(default, bool):
        kinds = (bool,)
    is_kind = isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds)
    # Bases of rotary wavelengths go beyond what a size can be, 3.6e9 for one.
    limit, called = (1e30, "a number") if float in kinds else (2**31, "a number below 2³¹")
    if not is_kind or value is None or not abs(value) < limit:
        raise InputError(
            f"{where} sets {field} to {value!r}, expected "
            f"{'a truth value' if bool in kinds else called}: download the folder again."
        )
    return value
