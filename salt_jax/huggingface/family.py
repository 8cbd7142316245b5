"""The interface of a Hugging Face model family, and the code shared by all families.

A family, one file in `families/` or elsewhere, maps config.json to a DecoderConfig and back, and
tensors to parameters, and names its tokenizer class. A setting that might change what a model
computes is never silently ignored (`config_fields`).
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.huggingface import rotary_fields
from salt_jax.huggingface.config_fields import other_computations, unknown_fields
from salt_jax.huggingface.tensors import Rule, rules_of
from salt_jax.huggingface.tokenizer_classes import TokenizerClass
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.models.rope_scaling import KINDS

# The fields that nearly every config.json has: see Family.fields.
SIZES: Mapping[str, tuple[str, Any]] = types.MappingProxyType(
    {
        "hidden_size": ("embed_dim", ...),
        "num_hidden_layers": ("num_layers", ...),
        "num_attention_heads": ("num_heads", ...),
        "intermediate_size": ("mlp_dim", ...),
        "max_position_embeddings": ("max_length", 2048),
    }
)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_OTHER_ACTIVATION = "hidden_activation"
# The settings of DecoderConfig that a family has at these values, unless it reads or fixes them.
_PLAIN: Mapping[str, Any] = types.MappingProxyType(
    {
        field.name: field.default
        for field in dataclasses.fields(DecoderConfig)
        if field.name
        in (
            *("qkv_bias", "qk_norm", "norm_placement", "layer_kinds", "window"),
            *("local_rope_theta", "attention_scale", "attention_soft_cap", "logits_soft_cap"),
            *("embedding_multiplier", "residual_multiplier", "logits_divisor", "learned_positions"),
            "absent_ids",
        )
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A family of Hugging Face models: data, and methods that a subclass may override.

    Attributes:
        model_type: its name in config.json.
        class_name: transformers' class.
        tensors: from each module's name in the files ("{layer}" stands for the layer's number) to
            the paths of its parameters in the decoder's tree. Several paths mean a fused tensor
            that holds them head by head or, with "+" between them, one below the other.
        fields: from config.json's fields to settings of DecoderConfig, with transformers' default;
            ... if the field is required.
        activation: the default of `hidden_act`.
        fixed: settings that every DecoderConfig of this family has.
        options: settings of DecoderConfig that `read_options` finds.
        option_fields: the fields in which it does.
        must_be: fields of which only one value is supported.
        theta_field: the name of the rotary base in transformers before 5.
        theta: that base's default.
        fraction_field: the same for the rotated share of a head; None if all of it is rotated.
        rope_fraction: the default of that share.
        scalings: the kinds of `rope_scaling`.
        norm_offset: subtracted from a norm's scale before it is stored.
        transposed: whether kernels are stored [inputs, outputs].
        tokenizer: its tokenizer class, if that has rules of its own.
        names_tokenizer: whether that class reads a tokenizer whose settings name no class.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, str]
    fields: Mapping[str, tuple[str, Any]]
    activation: str
    fixed: Mapping[str, Any]
    options: tuple[str, ...] = ()
    option_fields: tuple[str, ...] = ()
    must_be: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    theta_field: str = "rope_theta"
    theta: float = 10_000.0
    fraction_field: str | None = None
    rope_fraction: float = 1.0
    scalings: tuple[str, ...] = KINDS
    norm_offset: float = 0.0
    transposed: bool = False
    tokenizer: TokenizerClass | None = None
    names_tokenizer: bool = True

    def rules(self, config: DecoderConfig) -> list[Rule]:
        """The rules that convert tensors to parameters and back."""
        return rules_of(config, self.tensors, self.norm_offset, self.transposed)

    @property
    def head(self) -> str:
        """The name of the head's tensor, which the files of a tied model may have too."""
        return next(name for name, path in self.tensors.items() if path == "head") + ".weight"

    def read(self, settings: Mapping[str, Any], num_ids: int, where: str) -> DecoderConfig:
        """The model that a config.json describes, in float32.

        Args:
            settings: the config.json.
            num_ids: the tokenizer's number of ids; the embedding may have more rows.
            where: the file, for errors.

        Raises:
            InputError: A setting is not supported by the decoder.
        """
        for field, needed in self.must_be.items():
            if settings.get(field, needed) not in (needed, None):
                raise InputError(
                    f"{where} sets {field} to {settings[field]!r}, and salt_jax supports "
                    f"{self.model_type} with {needed!r} only: choose another model."
                )
        found = {
            setting: value_of(settings, field, default, where)
            for field, (setting, default) in self.fields.items()
        }
        scaling = rotary_fields.read_scaling(settings, where)
        if scaling is not None and scaling.kind not in self.scalings:
            raise InputError(
                f"{where} scales the rotary embedding by {scaling.kind!r}, which {self.model_type} "
                "doesn't have: choose another model."
            )
        theta, fraction = self._rotary(settings, where)
        activation = self._activation(settings, where)
        rows = value_of(settings, "vocab_size", ..., where)
        if rows < num_ids:
            raise InputError(
                f"{where} sets vocab_size to {rows} and the tokenizer has {num_ids} ids: it is "
                "another model's tokenizer; download the folder again."
            )
        more: dict[str, Any] = {"rope_scaling": scaling, **self.read_options(settings, where)}
        more |= {"mlp_activation": activation, "rope_theta": theta, "rope_fraction": fraction}
        if scaling is not None and scaling.kind == "longrope":
            more["max_length"] = min(found["max_length"], scaling.original_length)
        more |= {"vocab_size": num_ids, "vocab_multiple": vocab_multiple(num_ids, rows)}
        try:
            config = _plain(DecoderConfig(**{**self.fixed, **found, **more}))
        except InputError as error:
            raise InputError(f"{where} describes a model salt_jax doesn't have: {error}") from error
        for field in other_computations(settings, self._read_fields, config):
            raise InputError(
                f"{where} sets {field} to {settings[field]!r}, which salt_jax doesn't have for "
                f"{self.model_type}: choose another model, or delete the setting if you know that "
                "the logits don't depend on it."
            )
        return config

    def read_options(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Settings of DecoderConfig that take more than one field of a config.json, in a family
        with `options`; InputError where they can't be read."""
        del settings, where
        return {}

    def write_options(self, config: DecoderConfig) -> dict[str, Any]:
        """The inverse of read_options."""
        del config
        return {}

    def unread_fields(self, settings: Mapping[str, Any]) -> list[str]:
        """The fields of a config.json that are not read, except the usual harmless ones (token ids,
        dropout, generation settings)."""
        fields = unknown_fields(settings, self._read_fields)
        # transformers 5 reads only hidden_act; older versions read this field for Gemma.
        other = settings.get(_OTHER_ACTIVATION)
        if other is not None and _ACTIVATIONS.get(str(other)) != self._activation(settings, ""):
            fields.append(_OTHER_ACTIVATION)
        return fields

    def obstacles(self, config: DecoderConfig) -> list[str]:
        """The settings in which a model differs from this family; empty if it fits."""
        values = vars(_plain(config))
        varied = {*self.options, *(setting for setting, _ in self.fields.values())}
        plain = {name: value for name, value in _PLAIN.items() if name not in varied}
        needs = [
            f"{name} = {needed!r} and has {values[name]!r}"
            for name, needed in {**self.fixed, **{**plain, **self.fixed}}.items()
            if values[name] != needed
        ]
        if config.rope_scaling is not None and config.rope_scaling.kind not in self.scalings:
            needs.append(f"rope_scaling of {self.scalings or None} and has {config.rope_scaling}")
        return needs

    def write(
        self, config: DecoderConfig, rows: int, dtype: str, tokens: Mapping[str, int]
    ) -> dict[str, Any]:
        """The settings of a model's config.json; see `config_to_json`."""
        values = {**vars(config), "num_kv_heads": config.kv_heads, "head_dim": config.head_width}
        activation = next(n for n, ours in _ACTIVATIONS.items() if ours == config.mlp_activation)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_scaling is not None:
            rope |= rotary_fields.write_scaling(config.rope_scaling)
        settings = {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            **{field: values[setting] for field, (setting, _) in self.fields.items()},
            **{field: value for field, value in self.must_be.items() if value is not None},
            "hidden_act": activation,
            **self.write_options(config),
            # Both the names of transformers 5 and the older ones.
            self.theta_field: config.rope_theta,
            "rope_parameters": rope,
            "vocab_size": rows,
            "torch_dtype": dtype,
            **tokens,
        }
        if self.fraction_field:
            settings[self.fraction_field] = config.rope_fraction
            rope["partial_rotary_factor"] = config.rope_fraction
        return settings

    def activation_name(self, settings: Mapping[str, Any]) -> Any:
        """The activation that transformers 5 would use for a config.json."""
        return settings.get("hidden_act") or self.activation

    @property
    def _read_fields(self) -> set[str]:
        own = {*self.fields, *self.must_be, self.theta_field, *rotary_fields.FIELDS}
        own |= set(self.option_fields)
        return own | {"hidden_act", _OTHER_ACTIVATION, self.fraction_field or "hidden_act"}

    def _activation(self, settings: Mapping[str, Any], where: str) -> str:
        name = self.activation_name(settings)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise InputError(
                f"{where} sets hidden_act to {name!r}, expected one of {', '.join(_ACTIVATIONS)}: "
                "choose another model."
            )
        return _ACTIVATIONS[name]

    def _rotary(self, settings: Mapping[str, Any], where: str) -> tuple[float, float]:
        """The rotary base, and the share of a head that is rotated."""
        rope = rotary_fields.rotary_parameters(settings)
        theta, fraction = (
            value_of(settings, self.theta_field, self.theta, where),
            self.rope_fraction,
        )
        if self.fraction_field:
            fraction = value_of(settings, self.fraction_field, fraction, where)
        theta = float(value_of(rope, "rope_theta", float(theta), where))
        fraction = float(value_of(rope, "partial_rotary_factor", float(fraction), where))
        if not self.fraction_field and fraction != self.rope_fraction:
            raise InputError(
                f"{where} sets partial_rotary_factor to {fraction}, and {self.model_type} rotates "
                f"{self.rope_fraction:g} of a head: choose another model."
            )
        return theta, fraction


def vocab_multiple(num_ids: int, rows: int) -> int:
    """A multiple to which num_ids rounds up to `rows`: the largest power of two, or `rows`."""
    powers = (1 << exponent for exponent in reversed(range(rows.bit_length())))
    return next((power for power in powers if -(-num_ids // power) * power == rows), rows)


def _plain(config: DecoderConfig) -> DecoderConfig:
    """The same model without settings derived from others, so that equal models compare equal."""
    if config.kv_heads == config.num_heads:
        config = dataclasses.replace(config, num_kv_heads=None)
    if config.head_width * config.num_heads == config.embed_dim:
        config = dataclasses.replace(config, head_dim=None)
    return config


def value_of(settings: Mapping[str, Any], field: str, default: Any, where: str) -> Any:
    """A field that must be a number or a boolean, like its default; ... is a whole number that must
    be set."""
    value = settings.get(field)
    if value is None and default is not ...:
        return default
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (int,)
    if isinstance(default, bool):
        kinds = (bool,)
    is_kind = isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds)
    # Rotary bases may be larger than any size (3.6e9, say).
    limit, called = (1e30, "a number") if float in kinds else (2**31, "a number below 2³¹")
    if not is_kind or value is None or not abs(value) < limit:
        raise InputError(
            f"{where} sets {field} to {value!r}, expected "
            f"{'true or false' if bool in kinds else called}: download the folder again."
        )
    return value
