"""The decoder's settings, for teachers and students alike: its shape and how it is computed."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.models import layers, remat
from salt_jax.models.attention import BACKENDS
from salt_jax.models.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and how it is computed.

    Attributes:
      embed_dim: D, the model width.
      num_layers: Number of blocks.
      num_heads: H, query heads.
      mlp_dim: F, hidden width of the MLP.
      vocab_size: Number of ids in use; None takes the packed cache's.
      vocab_multiple: Embedding and head are padded up to a multiple of this many ids.
      max_length: Longest sequence, in tokens.
      num_kv_heads: G, key-value heads; num_heads if None.
      head_dim: K, width of a head; embed_dim // num_heads if None.
      mlp_activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      gated_mlp: act(gate(x)) · up(x) (arXiv 2002.05202) instead of act(up(x)).
      norm: "rmsnorm" or "layernorm".
      norm_epsilon: Added to the mean square, or the variance, before its root.
      parallel_residual: x + attention(norm(x)) + mlp(norm'(x)), as in GPT-NeoX, instead of one
        after the other.
      use_bias: Biases on every projection and LayerNorm, never on the head.
      rope_fraction: Share of a head's dimensions, the first ones, that have rotary embedding.
      rope_theta: Base of the rotary wavelengths.
      learned_positions: Add a learned embedding of each of max_length positions to embedded inputs,
        as in GPT-2.
      tied_embeddings: The head is the embedding, transposed.
      scale_embeddings: Multiply embedded inputs by √D so that one table can serve as input and as
        head, as in Gemma but not in GPT-NeoX or Llama.
      qkv_bias: Biases on query, key and value alone, as in Qwen2.
      qk_norm: A norm on queries and keys before their rotation: "none", "head" (each head by
        itself, with one scale for all: Qwen3) or "heads" (all together: OLMo 2).
      norm_placement: Norms "before" attention and MLP, "after" them (OLMo 2), or "both" (Gemma 2).
      rope_scaling: How rotary frequencies are scaled for long texts, or None.
      layer_kinds: The kind of each layer, repeated over the layers: "global", "local" (attends
        within `window`) or "nope" (without rotary embedding).
      window: Positions that a "local" layer attends to, its own included.
      local_rope_theta: rope_theta of "local" layers, which then have no rope_scaling; None if they
        have the same rotation as all.
      attention_scale: Multiplies q·k; 1 / √head_dim if None.
      attention_soft_cap: c of c · tanh(score / c) on attention's scores, or None.
      embedding_multiplier: Multiplies embedded inputs (Granite).
      residual_multiplier: Multiplies what a block adds to the residual stream (Granite).
      logits_divisor: Divides logits (Granite).
      logits_soft_cap: c of c · tanh(logit / c), or None.
      absent_ids: Some ids have no logits: the parameter head_bias, added to them, is -10,000 there
        (`salt transplant`).
      scan_layers: Scan one block over stacked parameters, which compiles fast.
      remat: What the backward pass recomputes, from nothing to all of a block: "none", "minimal",
        "attention", "attention_output", "full" or "offload"; see remat.py.
      dtype: Dtype of activations and products, "float32" or "bfloat16".
      param_dtype: Dtype of parameters; "float16" for imported models published in it.
      attention_backend: "xla" anywhere, "splash" on a TPU, "cudnn" on an NVIDIA GPU, or "auto": the
        fastest that supports this model here.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    vocab_size: int | None = None
    vocab_multiple: int = 128
    max_length: int = 2048
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_activation: str = "silu"
    gated_mlp: bool = True
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    parallel_residual: bool = False
    use_bias: bool = False
    rope_fraction: float = 1.0
    rope_theta: float = 10_000.0
    tied_embeddings: bool = True
    scale_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: str = "none"
    norm_placement: str = "before"
    rope_scaling: RopeScaling | None = None
    layer_kinds: tuple[str, ...] = ("global",)
    window: int | None = None
    local_rope_theta: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None
    absent_ids: bool = False
    learned_positions: bool = False
    scan_layers: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_SIZES:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"DecoderConfig.{name} is {value!r}; set it to a whole number of at least 1."
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"DecoderConfig.{name} is {getattr(self, name)!r}; "
                    f"set it to one of {', '.join(choices)}."
                )
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise InputError(
                f"DecoderConfig.embed_dim {self.embed_dim} is not a multiple of num_heads "
                f"{self.num_heads}; change one of them or set head_dim."
            )
        if self.num_heads % self.kv_heads:
            raise InputError(
                f"DecoderConfig.num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.kv_heads}; change num_kv_heads."
            )
        if not 0.0 <= self.rope_fraction <= 1.0:
            raise InputError(
                f"DecoderConfig.rope_fraction is {self.rope_fraction}; set it within [0, 1]."
            )
        if self.rotary_dim % 2:
            raise InputError(
                f"DecoderConfig.rope_fraction {self.rope_fraction} of a head of {self.head_width} "
                f"is {self.rotary_dim} dimensions, an odd number; change it or head_dim."
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_POSITIVE:
                continue
            if not 0.0 < value < math.inf:
                raise InputError(f"DecoderConfig.{name} is {value}; set it to a number above 0.")
        if isinstance(self.rope_scaling, Mapping):  # from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.absent_ids and self.logits_soft_cap is not None:
            raise InputError(
                f"DecoderConfig.logits_soft_cap is {self.logits_soft_cap}: with a cap on logits no "
                "id can have probability 0, which absent_ids is for: choose another model."
            )
        if self.rope_scaling is not None:
            self.rope_scaling.require_dimensions(self.rotary_dim)
        object.__setattr__(self, "layer_kinds", self._shortest_layer_kinds())
        if ("local" in self.layer_kinds) != (self.window is not None):
            raise InputError(
                f"DecoderConfig.window is {self.window} and layer_kinds {self.layer_kinds}; set "
                "window for layers that are 'local', and only for those."
            )

    def _shortest_layer_kinds(self) -> tuple[str, ...]:
        """layer_kinds as their shortest period, so that equal models compare equal."""
        kinds = tuple(self.layer_kinds)
        if not kinds or not set(kinds) <= set(LAYER_KINDS) or len(kinds) > self.num_layers:
            raise InputError(
                f"DecoderConfig.layer_kinds is {self.layer_kinds!r}; set it to at most num_layers "
                f"of {', '.join(LAYER_KINDS)}."
            )
        if len(kinds) == 1:
            return kinds
        of_layers = [kinds[layer % len(kinds)] for layer in range(self.num_layers)]
        periods = range(1, self.num_layers + 1)
        return next(
            tuple(of_layers[:period])
            for period in periods
            if all(kind == of_layers[i % period] for i, kind in enumerate(of_layers))
        )

    @property
    def kinds_of_layers(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return tuple(self.layer_kinds[i % len(self.layer_kinds)] for i in range(self.num_layers))

    @property
    def kv_heads(self) -> int:
        """G, key-value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """K, dimensions of a head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotary embedding rotates."""
        return int(self.head_width * self.rope_fraction)

    @property
    def padded_vocab_size(self) -> int:
        """V, rows of the embedding: vocab_size rounded up. InputError if that is not set."""
        if self.vocab_size is None:
            raise InputError(
                "DecoderConfig.vocab_size is not set; set it to the vocabulary's number of ids."
            )
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def shape(self) -> "DecoderConfig":
        """The config without settings of how it is computed: equal for equal parameter trees."""
        return dataclasses.replace(
            self,
            vocab_multiple=self.padded_vocab_size,
            max_length=self.max_length if self.learned_positions else 1,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_width,
            remat="none",
            dtype="float32",
            param_dtype="float32",
            attention_backend="xla",
        )

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters in matrix products: all kernels and the head, not the embedding lookup."""
        attention_kernels = 2 * self.embed_dim * self.head_width * (self.num_heads + self.kv_heads)
        mlp_kernels = (3 if self.gated_mlp else 2) * self.embed_dim * self.mlp_dim
        head = self.embed_dim * self.padded_vocab_size
        return self.num_layers * (attention_kernels + mlp_kernels) + head

    @property
    def num_parameters(self) -> int:
        """All parameters, with the vocabulary's padding; a tied embedding counts once."""
        norm = self.embed_dim * (2 if self.norm == "layernorm" and self.use_bias else 1)
        norms = 4 if self.norm_placement == "both" else 2
        biases = 0
        if self.use_bias:
            biases += self.head_width * (self.num_heads + 2 * self.kv_heads) + self.embed_dim
            biases += (2 if self.gated_mlp else 1) * self.mlp_dim + self.embed_dim
        if self.qkv_bias and not self.use_bias:
            biases += self.head_width * (self.num_heads + 2 * self.kv_heads)
        if self.qk_norm != "none":
            heads = self.num_heads + self.kv_heads if self.qk_norm == "heads" else 2
            biases += self.head_width * heads
        embedding = 0 if self.tied_embeddings else self.embed_dim * self.padded_vocab_size
        embedding += self.embed_dim * self.max_length if self.learned_positions else 0
        blocks = self.num_layers * (norms * norm + biases)
        head_bias = self.padded_vocab_size if self.absent_ids else 0
        return self.num_matmul_parameters + embedding + head_bias + blocks + norm

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object, for checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "DecoderConfig":
        """The inverse of to_json; InputError for an unknown or a missing setting."""
        try:
            return cls(**settings)
        except TypeError as error:
            raise InputError(
                f"The decoder settings {dict(settings)} are not a DecoderConfig ({error}); "
                "read them with the version that wrote them."
            ) from error


LAYER_KINDS = ("global", "local", "nope")

_OPTIONAL_SIZES = ("vocab_size", "num_kv_heads", "head_dim", "window")
_SIZES = (
    *("embed_dim", "num_layers", "num_heads", "mlp_dim", "vocab_multiple", "max_length"),
    *_OPTIONAL_SIZES,
)
_OPTIONAL_POSITIVE = (
    *("local_rope_theta", "attention_scale", "attention_soft_cap", "logits_soft_cap"),
)
_POSITIVE = (
    *("rope_theta", "norm_epsilon", "embedding_multiplier", "residual_multiplier"),
    *("logits_divisor", *_OPTIONAL_POSITIVE),
)
_CHOICES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "mlp_activation": tuple(layers.ACTIVATIONS),
        "norm": ("rmsnorm", "layernorm"),
        "qk_norm": ("none", "head", "heads"),
        "norm_placement": ("before", "after", "both"),
        "remat": ("none", *remat.POLICIES),
        "dtype": ("float32", "bfloat16"),
        "param_dtype": ("float32", "bfloat16", "float16"),
        "attention_backend": ("auto", *BACKENDS),
    }
)
