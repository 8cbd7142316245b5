"""The decoder-only transformer of teachers and students.

    hidden_BxLxD = Decoder(config).apply({"params": params}, inputs, segment_ids, positions)
    logits_BxLxV = logits(hidden_BxLxD, head_kernel(params, config), config)

It returns hidden states rather than logits, since the losses are computed from those and the head
without [B, L, V] logits. V is the padded vocabulary: losses and scores mask out the ids from
vocab_size on.

Logical axes, which rules map to mesh axes. Parameters: vocab, embed, mlp, heads, kv_heads,
head_dim, layers. Activations: batch, length, activation_embed, activation_heads,
activation_kv_heads, activation_mlp, activation_vocab.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from salt_jax.errors import InputError
from salt_jax.models import layers, remat
from salt_jax.models.attention import attention
from salt_jax.models.cached_attention import CACHE, NEW_KEYS_AND_VALUES, cached_attention
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.models.layer_kinds import rotations_of, score_options

# Standard deviation of the logits and of the embedded inputs at initialization, at any width. Small
# logits give a loss of about log V. Inputs smaller by 1/√D, as from one unscaled table for both,
# would be lost among the blocks' outputs, and training would start far slower.
_INITIAL_STD = 0.3
# With absent_ids, the hidden states' columns that the head has its bias in: 1 and zeros, as many as
# keep the width a multiple of a TPU's lanes and of most meshes.
_BIAS_COLUMNS = 128

# Its public name, in gin files and error messages, is decoder.DecoderConfig.
DecoderConfig.__module__ = __name__


class Visibility(NamedTuple):
    """The inputs of attention's mask.

    Attributes:
      segment_ids: [B, L]; a position attends to its own segment only.
      bidirectional: [B, L], the positions that attend to each other in both directions, or None.
      cached_segment_ids: [B, S], the segments of the positions in the cache, or None.
      slot: int32, the cache's slot of the new position, or None.
    """

    segment_ids: jax.Array
    bidirectional: jax.Array | None
    cached_segment_ids: jax.Array | None
    slot: jax.Array | None


class Decoder(nn.Module):
    """Embedding, blocks, final norm.

    For decoding (inference/decoding.py) there are two collections. If "cache" is given, positions
    also attend to the cached ones. If "new_keys_and_values" is mutable, each attention stores its
    key and value [B, L, G, K] there.

    `part` is the first block to apply and the one to stop before; None is all. A part from 0 leaves
    out the final norm, any other goes on from its hidden states x.
    """

    config: DecoderConfig
    part: tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self,
        inputs_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        positions_BxL: jax.Array,
        bidirectional_BxL: jax.Array | None = None,
        x_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          inputs_BxL: int32 token ids, the targets shifted right. An id outside the padded
            vocabulary gives NaN.
          segment_ids_BxL: int32; a position attends to its own segment only. 0 is padding.
          positions_BxL: int32, from 0 in each segment.
          bidirectional_BxL: bool; where True, the positions of a segment attend to each other in
            both directions. None is causal everywhere.
          x_BxLxD: Hidden states after the blocks before `part`.

        Returns:
          [B, L, D] in config.dtype; with absent_ids, followed by the columns of `head_kernel`'s.

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
            # Declares the parameter, which head_kernel reads.
            self._table("head")
        first, stop = self.part or (0, config.num_layers)
        if x_BxLxD is None:
            x_BxLxD = jnp.take(embedding_VxD, inputs_BxL, axis=0).astype(config.dtype)
            if config.scale_embeddings:
                x_BxLxD *= math.sqrt(config.embed_dim)
            if config.embedding_multiplier != 1.0:
                x_BxLxD *= config.embedding_multiplier
            if config.learned_positions:
                positions_PxD = self._table("position_embedding", None, config.max_length)
                x_BxLxD += jnp.take(positions_PxD, positions_BxL, axis=0).astype(config.dtype)
            x_BxLxD = _constrain(x_BxLxD, "activation_embed")
        rotations, kind_of_layer = rotations_of(config, positions_BxL)
        if kind_of_layer is not None:
            kind_of_layer = kind_of_layer[first:stop]
        cached: Any = [self.get_variable(CACHE, name) for name in ("segment_ids", "slot")]
        visibility = Visibility(segment_ids_BxL, bidirectional_BxL, *cached)

        block: Any = Block
        if config.remat != "none":
            # In a scan the loop itself keeps XLA from merging the recomputation.
            policy = remat.POLICIES[config.remat]
            block = nn.remat(block, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0, CACHE: 0, NEW_KEYS_AND_VALUES: 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast if kind_of_layer is None else 0),
                length=stop - first,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BxLxD, _ = blocks(config, name="layers")(
                x_BxLxD, visibility, rotations, kind_of_layer
            )
        else:
            for layer in range(first, stop):
                apply_block = block(config, name=f"layers_{layer}")
                kind = None if kind_of_layer is None else kind_of_layer[layer - first]
                x_BxLxD, _ = apply_block(x_BxLxD, visibility, rotations, kind)
        if self.part is not None and first == 0:
            return x_BxLxD
        x_BxLxD = _norm(config, "final_norm")(x_BxLxD)
        if config.logits_divisor != 1.0:
            x_BxLxD /= config.logits_divisor  # a factor of the hidden states is one of the logits
        if not config.absent_ids:
            return x_BxLxD
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        self.param("head_bias", init, (config.padded_vocab_size,), jnp.dtype(config.param_dtype))
        one_1x1xE = jnp.zeros((1, 1, _BIAS_COLUMNS), x_BxLxD.dtype).at[..., 0].set(1.0)
        one_BxLxE = jnp.broadcast_to(one_1x1xE, (*x_BxLxD.shape[:2], _BIAS_COLUMNS))
        return jnp.concatenate([x_BxLxD, one_BxLxE], axis=-1)

    def _table(self, name: str, axis: str | None = "vocab", rows: int | None = None) -> jax.Array:
        config = self.config
        input_alone = name != "head" and not config.tied_embeddings
        std = _INITIAL_STD
        if config.scale_embeddings or not input_alone:
            std /= math.sqrt(config.embed_dim)
        init = nn.with_logical_partitioning(nn.initializers.normal(std), (axis, "embed"))
        shape = (rows or config.padded_vocab_size, config.embed_dim)
        table: Any = self.param(name, init, shape, jnp.dtype(config.param_dtype))
        return table


class Block(nn.Module):
    """Attention and MLP with their norms, added to the residual stream in sequence or in parallel.

    `rotations` are those of each kind of layer; `kind` is the layer's own, None if all are alike.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        visibility: Visibility,
        rotations: Sequence[layers.Rotation],
        kind: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        config = self.config
        x_BxLxD = checkpoint_name(x_BxLxD, remat.BLOCK_INPUT)
        self_attention = SelfAttention(config, name="attention")
        normed_BxLxD = self._normed("before", "attention_norm", x_BxLxD)
        added_BxLxD = self_attention(normed_BxLxD, visibility, rotations, kind)
        attended_BxLxD = x_BxLxD + self._added("attention_out_norm", added_BxLxD)
        mlp_input_BxLxD = x_BxLxD if config.parallel_residual else attended_BxLxD
        normed_BxLxD = self._normed("before", "mlp_norm", mlp_input_BxLxD)
        added_BxLxD = Mlp(config, name="mlp")(normed_BxLxD)
        x_BxLxD = attended_BxLxD + self._added("mlp_out_norm", added_BxLxD)
        return _constrain(x_BxLxD, "activation_embed"), None

    def _normed(self, placement: str, name: str, x_BxLxD: jax.Array) -> jax.Array:
        if self.config.norm_placement not in (placement, "both"):
            return x_BxLxD
        return _norm(self.config, name)(x_BxLxD)

    def _added(self, norm: str, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = self._normed("after", norm, x_BxLxD)
        multiplier = self.config.residual_multiplier
        return x_BxLxD if multiplier == 1.0 else multiplier * x_BxLxD


class SelfAttention(nn.Module):
    """Rotary, grouped-query, causal self-attention with its four projections."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        visibility: Visibility,
        rotations: Sequence[layers.Rotation],
        kind: jax.Array | None,
    ) -> jax.Array:
        config = self.config
        rotation = rotations[0]
        if kind is not None:
            select = functools.partial(jax.lax.select_n, kind)
            rotation = jax.tree.map(select, *rotations)
        embed: layers.Axes = ((config.embed_dim, "embed"),)
        heads: layers.Axes = ((config.num_heads, "heads"), (config.head_width, "head_dim"))
        kv_heads: layers.Axes = ((config.kv_heads, "kv_heads"), (config.head_width, "head_dim"))
        query_BxLxHxK = self._normed(
            "query", heads, _projection(config, "query", embed, heads)(x_BxLxD)
        )
        key_BxLxGxK = self._normed(
            "key", kv_heads, _projection(config, "key", embed, kv_heads)(x_BxLxD)
        )
        query_BxLxHxK = layers.rotate(query_BxLxHxK, rotation)
        key_BxLxGxK = layers.rotate(key_BxLxGxK, rotation)
        value_BxLxGxK = _projection(config, "value", embed, kv_heads)(x_BxLxD)
        query_BxLxHxK = _constrain(query_BxLxHxK, "activation_heads", None)
        key_BxLxGxK = _constrain(key_BxLxGxK, "activation_kv_heads", None)
        value_BxLxGxK = _constrain(value_BxLxGxK, "activation_kv_heads", None)
        mixed_BxLxHxK = self._mixed(
            checkpoint_name(query_BxLxHxK, remat.QUERY),
            checkpoint_name(key_BxLxGxK, remat.KEY),
            checkpoint_name(value_BxLxGxK, remat.VALUE),
            visibility,
            kind,
        )
        attended_BxLxD = _projection(config, "out", heads, embed, into_residual=True)(mixed_BxLxHxK)
        return checkpoint_name(attended_BxLxD, remat.ATTENDED)

    def _normed(self, name: str, heads: layers.Axes, x: jax.Array) -> jax.Array:
        qk_norm = self.config.qk_norm
        if qk_norm == "none":
            return x
        return _norm(self.config, f"{name}_norm", heads if qk_norm == "heads" else heads[1:])(x)

    def _mixed(
        self,
        query_BxLxHxK: jax.Array,
        key_BxLxGxK: jax.Array,
        value_BxLxGxK: jax.Array,
        visibility: Visibility,
        kind: jax.Array | None,
    ) -> jax.Array:
        if self.is_mutable_collection(NEW_KEYS_AND_VALUES) and not self.is_initializing():
            self.put_variable(NEW_KEYS_AND_VALUES, "key", key_BxLxGxK)
            self.put_variable(NEW_KEYS_AND_VALUES, "value", value_BxLxGxK)
        heads = (query_BxLxHxK, key_BxLxGxK, value_BxLxGxK)
        segment_ids, bidirectional, cached_segment_ids, slot = visibility
        if cached_segment_ids is None:
            arguments: Any = (*heads, segment_ids, bidirectional)
            attend: Any = functools.partial(attention, backend=self.config.attention_backend)
        else:
            cache: Any = self.get_variable(CACHE, "key"), self.get_variable(CACHE, "value")
            arguments = (*heads, segment_ids, *cache, cached_segment_ids, slot)
            attend = cached_attention
        # Windows are constants of the kernels: layers that differ in theirs choose a branch.
        branches = [functools.partial(attend, options=one) for one in score_options(self.config)]
        if kind is None or len({branch.keywords["options"] for branch in branches}) == 1:
            mixed_BxLxHxK: jax.Array = branches[0](*arguments)
            return mixed_BxLxHxK
        return jax.lax.switch(kind, branches, *arguments)


class Mlp(nn.Module):
    """A two-layer MLP, gated or not."""

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
    """Initial parameters, boxed with their logical axes; nn.unbox gives the arrays."""
    # Flash kernels don't support the single token that Flax traces the model with.
    config = dataclasses.replace(config, attention_backend="xla")
    token_1x1 = jnp.zeros((1, 1), dtype=jnp.int32)
    return Decoder(config).init(rng, token_1x1, token_1x1, token_1x1)["params"]


def abstract_params(config: DecoderConfig) -> Any:
    """The tree of init_params with jax.ShapeDtypeStructs as leaves."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def kernel_axes(config: DecoderConfig) -> Any:
    """The tree of init_params with (input axes, output axes) of each kernel, None for other leaves.

    A kernel's remaining axis, that of scanned layers, stacks separate matrices.
    """

    def one(path: Any, box: nn.LogicallyPartitioned) -> tuple[tuple[int, ...], ...] | None:
        if path[-1].key != "kernel":
            return None
        own = [axis for axis, name in enumerate(box.names) if name != "layers"]
        # A projection's inputs come first, and one side of it is the residual stream.
        inputs = 1 if box.names[own[0]] == "embed" else len(own) - 1
        return tuple(own[:inputs]), tuple(own[inputs:])

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, abstract_params(config), is_leaf=is_box)


def hidden_states(config: DecoderConfig, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Hidden states, [B, L, D], of a batch with the arguments of Decoder by name."""
    tokens = (batch["inputs"], batch["segment_ids"], batch["positions"], batch.get("bidirectional"))
    hidden_BxLxD: jax.Array = Decoder(config).apply({"params": params}, *tokens)  # type: ignore[assignment]
    return hidden_BxLxD


def early_and_last_states(
    config: DecoderConfig, params: Any, batch: Mapping[str, jax.Array], layer: int
) -> tuple[jax.Array, jax.Array]:
    """Hidden states after the first `layer` blocks, without a norm, and those of hidden_states.

    The scan is in two parts, so that no other layer's states are kept.
    """
    tokens = (batch["inputs"], batch["segment_ids"], batch["positions"], batch.get("bidirectional"))

    def apply(first: int, stop: int, x_BxLxD: jax.Array | None) -> jax.Array:
        own = dict(params)
        if config.scan_layers:
            own["layers"] = jax.tree.map(lambda leaf: leaf[first:stop], params["layers"])
        y_BxLxD: jax.Array = Decoder(config, (first, stop)).apply({"params": own}, *tokens, x_BxLxD)  # type: ignore[assignment]
        return y_BxLxD

    early_BxLxD = apply(0, layer, None)
    return early_BxLxD, apply(layer, config.num_layers, early_BxLxD)


def stacked_params(params: Any, config: DecoderConfig, num_layers: int) -> Any:
    """The parameters of a deeper model: its layer i is layer i mod m of the m of `config`."""
    order = [layer % config.num_layers for layer in range(num_layers)]
    if config.scan_layers:
        stack = jax.tree.map(lambda leaf: leaf[jnp.array(order)], params["layers"])
        return {**params, "layers": stack}
    own = {f"layers_{layer}": params[f"layers_{of}"] for layer, of in enumerate(order)}
    return {**params, **own}


def head_kernel(params: Any, config: DecoderConfig) -> jax.Array:
    """The head's kernel, [V, D], in param_dtype; the embedding itself if the two are tied.

    With absent_ids the bias follows as a column, for the hidden states' 1, and columns of zeros.
    """
    params = nn.unbox(params)
    head_VxD: jax.Array = params["embedding" if config.tied_embeddings else "head"]
    if not config.absent_ids:
        return head_VxD
    bias_VxE = jnp.pad(params["head_bias"][:, None], ((0, 0), (0, _BIAS_COLUMNS - 1)))
    return jnp.concatenate([head_VxD, bias_VxE], axis=-1)


def logits(hidden_BxLxD: jax.Array, head_VxD: jax.Array, config: DecoderConfig) -> jax.Array:
    """Logits, float32 [B, L, V], from a product in config.dtype; V is the padded vocabulary.

    `distill/head_sharding.py` computes the same for a chunk of tokens.
    """
    logits_BxLxV = jnp.einsum(
        "bld,vd->blv",
        hidden_BxLxD.astype(config.dtype),
        head_VxD.astype(config.dtype),
        preferred_element_type=jnp.float32,
    )
    logits_BxLxV = layers.soft_capped(logits_BxLxV, config.logits_soft_cap)
    return _constrain(logits_BxLxV, "activation_vocab")


def _projection(
    config: DecoderConfig,
    name: str,
    inputs: layers.Axes,
    outputs: layers.Axes,
    into_residual: bool = False,
) -> layers.Projection:
    use_bias = config.use_bias or (config.qkv_bias and name in ("query", "key", "value"))
    std = 1.0 / math.sqrt(math.prod(size for size, _ in inputs))
    if into_residual:
        # As in GPT-2, so that the initial residual stream doesn't grow with the number of layers.
        std /= math.sqrt(2 * config.num_layers)
    dtype, param_dtype = config.dtype, config.param_dtype
    return layers.Projection(inputs, outputs, std, use_bias, dtype, param_dtype, name=name)


def _norm(config: DecoderConfig, name: str, axes: layers.Axes | None = None) -> layers.Norm:
    """A norm over `axes`, or over the model's width."""
    kind, epsilon, use_bias = config.norm, config.norm_epsilon, config.use_bias
    axes = axes or ((config.embed_dim, "embed"),)
    return layers.Norm(kind, epsilon, use_bias, config.dtype, config.param_dtype, axes, name=name)


def _constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    return nn.with_logical_constraint(x, ("batch", "length", *axes))
