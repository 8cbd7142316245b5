"""Decoding with a key-value cache: whole prompts first, then a token at a time.

    state, tokens_Bx1, log_p_Bx1 = begin(config, params, prompts_BxL, …)
    state, tokens_BxC, log_p_BxC = advance(config, params, state, limit, …)

Prompts are padded on the left, so that the newest tokens of all rows share a slot of the cache;
positions count from each row's first token. The cache is sharded by the logical axes (layers,)
batch, activation_kv_heads, length, None.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from salt_jax.inference.sampling import Sampling, sample_token
from salt_jax.models.cached_attention import CACHE, NEW_KEYS_AND_VALUES
from salt_jax.models.decoder import Decoder, DecoderConfig, head_kernel, logits

NO_TOKEN = -1


class DecodingCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      layers: The decoder's collection "cache": key and value [B, G, S, K] of each attention,
        stacked over scanned layers.
      segment_ids: int32 [B, S], 1 where a slot holds a token, 0 where it is padding or empty.
      lengths: int32 [B], tokens of each row, and so the position of its next one.
      slot: int32, the slot of the next tokens of all rows.
    """

    layers: Any
    segment_ids: jax.Array
    lengths: jax.Array
    slot: jax.Array


class State(NamedTuple):
    """The state of decoding between two calls of `advance`.

    Attributes:
      cache: All tokens but the newest.
      tokens: int32 [B], the newest tokens.
      keys: Random keys [B]; `made` is folded into them for each token.
      made: int32, new tokens of each unfinished row.
      finished: bool [B]; the caller may finish more rows.
    """

    cache: DecodingCache
    tokens: jax.Array
    keys: jax.Array
    made: jax.Array
    finished: jax.Array


_Carry = tuple[State, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How tokens are chosen and what ends a row; a constant of the program.

    Attributes:
      sampling: The sampling settings; the seed is in the keys.
      vocab_size: Ids from here on are never chosen.
      end_ids: Ids that finish a row.
    """

    sampling: Sampling
    vocab_size: int
    end_ids: tuple[int, ...]


def prefill(
    config: DecoderConfig,
    params: Any,
    prompts_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    slots: int,
) -> tuple[jax.Array, DecodingCache]:
    """Reads whole prompts, int32 padded on the left, into a new cache.

    Segment ids are 1 for prompts and 0 for padding; `slots` is S, the tokens that fit into the
    cache, at least L.

    Returns:
      float32 logits [B, V] of the token after each prompt, and the cache.
    """
    positions_BxL = jnp.maximum(jnp.cumsum(segment_ids_BxL, axis=1) - 1, 0)
    hidden_BxLxD, new = _apply(
        config, {"params": params}, prompts_BxL, segment_ids_BxL, positions_BxL
    )
    length = prompts_BxL.shape[1]

    def stored(x: jax.Array) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[-2] = (0, slots - length)
        return _constrain(jnp.pad(x.swapaxes(-3, -2), room))

    cache = DecodingCache(
        jax.tree.map(stored, new),
        jnp.pad(segment_ids_BxL, [(0, 0), (0, slots - length)]),
        jnp.sum(segment_ids_BxL, axis=1),
        jnp.int32(length),
    )
    return _next_logits(config, params, hidden_BxLxD[:, -1:]), cache


def step(
    config: DecoderConfig, params: Any, cache: DecodingCache, token_B: jax.Array
) -> tuple[jax.Array, DecodingCache]:
    """Reads one more token of each row; returns the float32 logits [B, V] and the new cache."""
    segment_ids_Bx1 = jnp.ones_like(token_B)[:, None]
    visible = {"segment_ids": cache.segment_ids, "slot": cache.slot}
    variables = {"params": params, CACHE: {**cache.layers, **visible}}
    positions_Bx1 = cache.lengths[:, None]
    hidden_Bx1xD, new = _apply(config, variables, token_B[:, None], segment_ids_Bx1, positions_Bx1)

    def stored(old: jax.Array, x: jax.Array) -> jax.Array:
        x = x.swapaxes(-3, -2)
        return _constrain(jax.lax.dynamic_update_slice_in_dim(old, x, cache.slot, axis=-2))

    segment_ids_BxS = jax.lax.dynamic_update_slice_in_dim(
        cache.segment_ids, segment_ids_Bx1, cache.slot, axis=1
    )
    layers = jax.tree.map(stored, cache.layers, new)
    cache = DecodingCache(layers, segment_ids_BxS, cache.lengths + 1, cache.slot + 1)
    return _next_logits(config, params, hidden_Bx1xD), cache


def begin(
    config: DecoderConfig,
    params: Any,
    prompts_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    rows_B: jax.Array,
    seed: jax.Array,
    *,
    slots: int,
    choice: Choice,
) -> tuple[State, jax.Array, jax.Array]:
    """Reads prompts and chooses the first token of each; see `prefill` and `advance`.

    rows_B are int32 numbers that make the random keys of rows independent; −1 marks a filler row.
    `seed` is uint32, and `slots` has room for all new tokens.

    Returns:
      The state, and the tokens and their log-probabilities, both [B, 1].
    """
    logits_BxV, cache = prefill(config, params, prompts_BxL, segment_ids_BxL, slots)
    key = jax.random.key(seed)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
    made, finished_B = jnp.int32(0), rows_B < 0
    token_B, log_p_B = _choose(logits_BxV, keys_B, made, choice)
    shown_B = jnp.where(finished_B, NO_TOKEN, token_B)
    finished_B |= _ends(token_B, choice)
    state = State(cache, token_B, keys_B, made + 1, finished_B)
    return _laid_out(state), shown_B[:, None], log_p_B[:, None]


def advance(
    config: DecoderConfig,
    params: Any,
    state: State,
    limit: jax.Array,
    *,
    chunk: int,
    choice: Choice,
) -> tuple[State, jax.Array, jax.Array]:
    """Continues every row by `limit` tokens, or until all are finished, in one loop on the device.

    `state` comes from begin or advance; `limit` is int32 and at most `chunk`, which is C.

    Returns:
      The state; the tokens, int32 [B, C], including the end id and then NO_TOKEN; and their
      log-probabilities under the model, float32 [B, C] (see sample_token).
    """
    tokens_BxC = jnp.full((len(state.tokens), chunk), NO_TOKEN, jnp.int32)
    log_p_BxC = jnp.zeros(tokens_BxC.shape, jnp.float32)
    first = state.made

    def goes_on(carry: _Carry) -> jax.Array:
        state, _, _ = carry
        return (state.made - first < limit) & ~jnp.all(state.finished)

    def one_more(carry: _Carry) -> _Carry:
        (cache, token_B, keys_B, made, finished_B), tokens_BxC, log_p_BxC = carry
        logits_BxV, cache = step(config, params, cache, token_B)
        token_B, log_p_B = _choose(logits_BxV, keys_B, made, choice)
        shown_B = jnp.where(finished_B, NO_TOKEN, token_B)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=made - first, axis=1)
        tokens_BxC, log_p_BxC = put(tokens_BxC, shown_B), put(log_p_BxC, log_p_B)
        finished_B |= _ends(token_B, choice)
        return State(cache, token_B, keys_B, made + 1, finished_B), tokens_BxC, log_p_BxC

    state, tokens_BxC, log_p_BxC = jax.lax.while_loop(
        goes_on, one_more, (state, tokens_BxC, log_p_BxC)
    )
    return _laid_out(state), tokens_BxC, log_p_BxC


def _choose(
    logits_BxV: jax.Array, keys_B: jax.Array, made: jax.Array, choice: Choice
) -> tuple[jax.Array, jax.Array]:
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, made))(keys_B)
    return sample_token(logits_BxV, keys_B, choice.sampling, choice.vocab_size)


def _ends(token_B: jax.Array, choice: Choice) -> jax.Array:
    return jnp.isin(token_B, jnp.array(choice.end_ids, jnp.int32))


def _apply(config: DecoderConfig, variables: Any, *tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Hidden states, and the new key and value, [B, L, G, K], of each attention."""
    config = dataclasses.replace(config, remat="none")  # there is no backward pass
    hidden_BxLxD, left = Decoder(config).apply(variables, *tokens, mutable=[NEW_KEYS_AND_VALUES])
    return hidden_BxLxD, left[NEW_KEYS_AND_VALUES]


def _next_logits(config: DecoderConfig, params: Any, hidden_Bx1xD: jax.Array) -> jax.Array:
    return logits(hidden_Bx1xD, head_kernel(params, config), config)[:, 0]


def _laid_out(state: State) -> State:
    """Constrains the state to one sharding, so that `advance` accepts it from both programs."""

    def rows(x: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(x, ("batch", None)[: x.ndim])

    cache, tokens, keys, made, finished = state
    layers, segment_ids, lengths, slot = cache
    layers = jax.tree.map(_constrain, layers)
    cache = DecodingCache(layers, rows(segment_ids), rows(lengths), slot)
    return State(cache, rows(tokens), rows(keys), made, rows(finished))


def _constrain(x: jax.Array) -> jax.Array:
    """Constrains the sharding of cached keys or values, [B, G, S, K] or [layers, B, G, S, K]."""
    axes = ("layers", "batch", "activation_kv_heads", "length", None)
    return nn.with_logical_constraint(x, axes[-x.ndim :])
