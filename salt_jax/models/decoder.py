"""The decoder: token ids, segment ids and positions in, hidden states out; the head apart.

    hidden_BxLxD = Decoder(config).apply({"params": params}, inputs, segment_ids, positions)
    logits_BxLxV = logits(hidden_BxLxD, head_kernel(params, config), config)

Teacher and student are both this model. Hidden states and head come apart because the losses are
made from both, without [B, L, V] logits where those don't fit. V here is the padded vocabulary:
losses and scores mask the ids from vocab_size on.

Logical axes, which rules map to a mesh. Parameters: vocab, embed, mlp, heads, kv_heads, head_dim,
layers. Activations: batch, length, activation_embed, activation_heads, activation_kv_heads,
activation_mlp, activation_vocab.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from salt_jax.errors import InputError
from salt_jax.models import layers
from salt_jax.models.attention import BACKENDS, attention

# Standard deviation of a fresh model's logits and of its embedded inputs, at any width. The logits
# must be small, for a loss of about log V; inputs 1/√D as large, which one unscaled table for both
# would make them, are lost among what the blocks add, and training starts far slower.
_INITIAL_STD = 0.3

REMAT_POLICIES: Mapping[str, Callable[..., Any]] = types.MappingProxyType(
    {
        "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and how it computes.

    Attributes:
        embed_dim: D, the model width.
        num_layers: number of blocks.
        num_heads: H, query heads.
        mlp_dim: F, hidden width of the MLP.
        vocab_size: ids that mean something; None = those of the packed cache, filled in later.
        vocab_multiple: embedding and head are padded up to a multiple of this many ids.
        max_length: longest sequence, in tokens.
        num_kv_heads: G, key-value heads; None = num_heads.
        head_dim: K; None = embed_dim // num_heads.
        mlp_activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
        gated_mlp: act(gate(x)) · up(x) (arXiv 2002.05202) instead of act(up(x)).
        norm: "rmsnorm" or "layernorm".
        norm_epsilon: added to the mean square, or the variance, before its root.
        parallel_residual: x + attention(norm(x)) + mlp(norm'(x)), as in GPT-NeoX, instead of one
            after the other.
        use_bias: biases on every projection and LayerNorm, never on the head.
        rope_fraction: share of each head's dimensions that rotary embedding turns, the first ones.
        rope_theta: base of the rotary wavelengths.
        tied_embeddings: the head is the embedding, transposed.
        scale_embeddings: multiply embedded inputs by √D, as Gemma does and GPT-NeoX and Llama
            don't: with it one table can serve as input and as head.
        scan_layers: one block scanned over stacked parameters (compiles fast), not num_layers.
        remat: what the backward pass recomputes: "none", "minimal" (all but the products with
            parameters) or "full".
        dtype: of activations and products, "float32" or "bfloat16".
        param_dtype: of parameters.
        attention_backend: which implementation of attention.
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
    scan_layers: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention_backend: str = "xla"

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
        for name in ("rope_theta", "norm_epsilon"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"DecoderConfig.{name} is {getattr(self, name)}; set it to a number above 0."
                )

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
        """Dimensions of a head that rotary embedding turns."""
        return int(self.head_width * self.rope_fraction)

    @property
    def padded_vocab_size(self) -> int:
        """V, rows of the embedding: vocab_size rounded up; an InputError while that is not set."""
        if self.vocab_size is None:
            raise InputError(
                "DecoderConfig.vocab_size is not set; set it to the vocabulary's number of ids."
            )
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters in matrix products: all kernels and the head, not the embedding look-up."""
        attention_kernels = 2 * self.embed_dim * self.head_width * (self.num_heads + self.kv_heads)
        mlp_kernels = (3 if self.gated_mlp else 2) * self.embed_dim * self.mlp_dim
        head = self.embed_dim * self.padded_vocab_size
        return self.num_layers * (attention_kernels + mlp_kernels) + head

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding once, the padding of the vocabulary included."""
        norm = self.embed_dim * (2 if self.norm == "layernorm" and self.use_bias else 1)
        biases = 0
        if self.use_bias:
            biases += self.head_width * (self.num_heads + 2 * self.kv_heads) + self.embed_dim
            biases += (2 if self.gated_mlp else 1) * self.mlp_dim + self.embed_dim
        embedding = 0 if self.tied_embeddings else self.embed_dim * self.padded_vocab_size
        blocks = self.num_layers * (2 * norm + biases)
        return self.num_matmul_parameters + embedding + blocks + norm

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object, for the checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "DecoderConfig":
        """The config that to_json wrote; an unknown or a missing setting is an InputError."""
        try:
            return cls(**settings)
        except TypeError as error:
            raise InputError(
                f"The decoder settings {dict(settings)} are not a DecoderConfig ({error}); "
                "read them with the version that wrote them."
            ) from error


_OPTIONAL_SIZES = ("vocab_size", "num_kv_heads", "head_dim")
_SIZES = (
    *("embed_dim", "num_layers", "num_heads", "mlp_dim", "vocab_multiple", "max_length"),
    *_OPTIONAL_SIZES,
)
_CHOICES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "mlp_activation": tuple(layers.ACTIVATIONS),
        "norm": ("rmsnorm", "layernorm"),
        "remat": ("none", *REMAT_POLICIES),
        "dtype": ("float32", "bfloat16"),
        "param_dtype": ("float32", "bfloat16"),
        "attention_backend": tuple(BACKENDS),
    }
)


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, inputs_BxL: jax.Array, segment_ids_BxL: jax.Array, positions_BxL: jax.Array
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
            inputs_BxL: int32 token ids, each the one before its target. One outside the padded
                vocabulary gives NaN.
            segment_ids_BxL: int32; a position sees its own segment only. 0 = padding.
            positions_BxL: int32, counted from 0 in each segment.

        Returns:
            [B, L, D] in config.dtype.

        Raises:
            InputError: L is above config.max_length.
        """
        config = self.config
        if inputs_BxL.shape[1] > config.max_length:
            raise InputError(
                f"Sequences of {inputs_BxL.shape[1]} tokens are longer than the model takes; "
                f"set DecoderConfig.max_length, now {config.max_length}, to at least that."
            )
        embedding_VxD = self._table("embedding")
        if not config.tied_embeddings:
            # Declared here to be made and named with the rest; head_kernel alone uses it.
            self._table("head")
        x_BxLxD = jnp.take(embedding_VxD, inputs_BxL, axis=0).astype(config.dtype)
        if config.scale_embeddings:
            x_BxLxD *= math.sqrt(config.embed_dim)
        x_BxLxD = _constrain(x_BxLxD, "activation_embed")
        rotation = layers.rotary_angles(positions_BxL, config.rotary_dim, config.rope_theta)

        block: Any = Block
        if config.remat != "none":
            # In a scan the loop itself keeps XLA from merging the recomputation away.
            policy = REMAT_POLICIES[config.remat]
            block = nn.remat(block, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BxLxD, _ = blocks(config, name="layers")(x_BxLxD, segment_ids_BxL, rotation)
        else:
            for layer in range(config.num_layers):
                apply_block = block(config, name=f"layers_{layer}")
                x_BxLxD, _ = apply_block(x_BxLxD, segment_ids_BxL, rotation)
        return _norm(config, "final_norm")(x_BxLxD)

    def _table(self, name: str) -> jax.Array:
        config = self.config
        input_alone = name == "embedding" and not config.tied_embeddings
        std = _INITIAL_STD
        if config.scale_embeddings or not input_alone:
            std /= math.sqrt(config.embed_dim)
        init = nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "embed"))
        shape = (config.padded_vocab_size, config.embed_dim)
        table: Any = self.param(name, init, shape, jnp.dtype(config.param_dtype))
        return table


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream and added to it."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, segment_ids_BxL: jax.Array, rotation: layers.Rotation
    ) -> tuple[jax.Array, None]:
        config = self.config
        normed_BxLxD = _norm(config, "attention_norm")(x_BxLxD)
        self_attention = SelfAttention(config, name="attention")
        attended_BxLxD = x_BxLxD + self_attention(normed_BxLxD, segment_ids_BxL, rotation)
        mlp_input_BxLxD = x_BxLxD if config.parallel_residual else attended_BxLxD
        normed_BxLxD = _norm(config, "mlp_norm")(mlp_input_BxLxD)
        x_BxLxD = attended_BxLxD + Mlp(config, name="mlp")(normed_BxLxD)
        return _constrain(x_BxLxD, "activation_embed"), None


class SelfAttention(nn.Module):
    """Rotary, grouped-query, causal self-attention with its four projections."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, segment_ids_BxL: jax.Array, rotation: layers.Rotation
    ) -> jax.Array:
        config = self.config
        embed: layers.Axes = ((config.embed_dim, "embed"),)
        heads: layers.Axes = ((config.num_heads, "heads"), (config.head_width, "head_dim"))
        kv_heads: layers.Axes = ((config.kv_heads, "kv_heads"), (config.head_width, "head_dim"))
        query_BxLxHxK = layers.rotate(_projection(config, "query", embed, heads)(x_BxLxD), rotation)
        key_BxLxGxK = layers.rotate(_projection(config, "key", embed, kv_heads)(x_BxLxD), rotation)
        value_BxLxGxK = _projection(config, "value", embed, kv_heads)(x_BxLxD)
        mixed_BxLxHxK = attention(
            _constrain(query_BxLxHxK, "activation_heads", None),
            _constrain(key_BxLxGxK, "activation_kv_heads", None),
            _constrain(value_BxLxGxK, "activation_kv_heads", None),
            segment_ids_BxL,
            backend=config.attention_backend,
        )
        return _projection(config, "out", heads, embed, into_residual=True)(mixed_BxLxHxK)


class Mlp(nn.Module):
    """Two layers, the first one gated or not."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        config = self.config
        embed: layers.Axes = ((config.embed_dim, "embed"),)
        hidden: layers.Axes = ((config.mlp_dim, "mlp"),)
        activation = layers.ACTIVATIONS[config.mlp_activation]
        up_BxLxF = _projection(config, "up", embed, hidden)(x_BxLxD)
        if config.gated_mlp:
            gate_BxLxF = _projection(config, "gate", embed, hidden)(x_BxLxD)
            h_BxLxF = activation(gate_BxLxF) * up_BxLxF
        else:
            h_BxLxF = activation(up_BxLxF)
        h_BxLxF = _constrain(h_BxLxF, "activation_mlp")
        return _projection(config, "down", hidden, embed, into_residual=True)(h_BxLxF)


def init_params(config: DecoderConfig, rng: jax.Array) -> Any:
    """Fresh parameters, each boxed with its logical axes; nn.unbox takes the arrays out."""
    token_1x1 = jnp.zeros((1, 1), dtype=jnp.int32)
    return Decoder(config).init(rng, token_1x1, token_1x1, token_1x1)["params"]


def abstract_params(config: DecoderConfig) -> Any:
    """The tree of init_params with shapes and dtypes in place of arrays."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def hidden_states(config: DecoderConfig, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The model's hidden states, [B, L, D], of a batch's inputs, segment_ids and positions."""
    tokens = (batch["inputs"], batch["segment_ids"], batch["positions"])
    hidden_BxLxD: jax.Array = Decoder(config).apply({"params": params}, *tokens)  # type: ignore[assignment]
    return hidden_BxLxD


def head_kernel(params: Any, config: DecoderConfig) -> jax.Array:
    """The head's kernel [V, D] in param_dtype; the embedding itself if the two are tied."""
    head_VxD: jax.Array = nn.unbox(params)["embedding" if config.tied_embeddings else "head"]
    return head_VxD


def logits(hidden_BxLxD: jax.Array, head_VxD: jax.Array, config: DecoderConfig) -> jax.Array:
    """[B, L, V] in float32, of a product in config.dtype; V is the padded vocabulary."""
    logits_BxLxV = jnp.einsum(
        "bld,vd->blv",
        hidden_BxLxD.astype(config.dtype),
        head_VxD.astype(config.dtype),
        preferred_element_type=jnp.float32,
    )
    return _constrain(logits_BxLxV, "activation_vocab")


def _projection(
    config: DecoderConfig,
    name: str,
    inputs: layers.Axes,
    outputs: layers.Axes,
    into_residual: bool = False,
) -> layers.Projection:
    std = 1.0 / math.sqrt(math.prod(size for size, _ in inputs))
    if into_residual:
        # The residual stream then starts at one size however many layers add to it (GPT-2).
        std /= math.sqrt(2 * config.num_layers)
    dtype, param_dtype = config.dtype, config.param_dtype
    return layers.Projection(inputs, outputs, std, config.use_bias, dtype, param_dtype, name=name)


def _norm(config: DecoderConfig, name: str) -> layers.Norm:
    kind, epsilon, use_bias = config.norm, config.norm_epsilon, config.use_bias
    return layers.Norm(kind, epsilon, use_bias, config.dtype, config.param_dtype, name=name)


def _constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    return nn.with_logical_constraint(x, ("batch", "length", *axes))
