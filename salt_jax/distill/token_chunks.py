"""A batch's tokens in chunks: hidden states and targets of C tokens at a time on each device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.distill.head_sharding import HeadSharding, VocabularyPart, gathered


def map_chunks(
    one_chunk: Callable[[VocabularyPart, jax.Array, Any], Any],
    hidden_BxLxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    vocab_size: int,
    chunk_tokens: int,
    sharding: HeadSharding | None,
    soft_cap: float | None,
) -> Any:
    """Applies one_chunk to each device's chunks of tokens; the results are [B, L, …]."""

    def body(
        hidden_BxLxD: jax.Array, head_VxD: jax.Array, targets_BxL: jax.Array, weights_BxL: jax.Array
    ) -> Any:
        head_VxD = gathered(sharding, head_VxD, shape)
        vocabulary = VocabularyPart(sharding, head_VxD.shape[0], vocab_size, soft_cap)
        counts_BxL = weights_BxL > 0
        tokens = flat_tokens(counts_BxL, hidden_BxLxD), flat_tokens(counts_BxL, targets_BxL)
        _, values = lax.scan(
            lambda _, chunk: (None, one_chunk(vocabulary, head_VxD, chunk)),
            None,
            chunked(tokens, chunk_tokens),
        )
        return jax.tree.map(lambda x: unchunked(x, targets_BxL.shape), values)

    shape = head_VxD.shape
    head_VxD = head_VxD.astype(hidden_BxLxD.dtype)
    if sharding is None:
        return body(hidden_BxLxD, head_VxD, targets_BxL, weights_BxL)
    tokens, head = sharding.tokens, sharding.head(head_VxD)
    return jax.shard_map(
        body,
        mesh=sharding.mesh,
        in_specs=(tokens, head, tokens, tokens),
        out_specs=tokens,
        check_vma=False,
    )(hidden_BxLxD, head_VxD, targets_BxL, weights_BxL)


def flat_tokens(counts_BxL: jax.Array, x: jax.Array) -> jax.Array:
    """[B, L, …] → [B · L, …], 0 where masked out, since 0 · NaN in a gradient would be NaN."""
    counts = counts_BxL.reshape(counts_BxL.shape + (1,) * (x.ndim - 2))
    return jnp.where(counts, x, 0).reshape(-1, *x.shape[2:])


def chunked(tokens: Any, chunk_tokens: int) -> Any:
    """[N, …] → [chunks, C, …], with C at most chunk_tokens, padded with zeros."""
    count = jax.tree.leaves(tokens)[0].shape[0]
    chunks = max(1, -(-count // chunk_tokens))
    size = -(-count // chunks)

    def one(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, chunks * size - count), *(((0, 0),) * (x.ndim - 1))))
        return x.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(one, tokens)


def unchunked(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of chunked: [chunks, C, …] → [B, L, …]."""
    tokens = x.reshape(-1, *x.shape[2:])
    return tokens[: shape[0] * shape[1]].reshape(*shape, *x.shape[2:])
