"""Sampling of the next token: greedy, or random after temperature, top-k and then top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from salt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; of equally likely tokens the lower id counts as more likely.

    Attributes:
      temperature: Divides the logits; 0 always takes the most likely token.
      top_k: Only the k most likely tokens can be chosen; 0 for all.
      top_p: Only the smallest set of tokens whose probability, after temperature and top-k, is at
        least p can be chosen (the nucleus, arXiv 1904.09751); 1 for all.
      seed: Seed of the random keys.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; set it to 0, which is greedy, or a number "
                "above 0."
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; set it to at least 1, or to 0 for all.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}; set it above 0 and to at most 1.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; set it to a whole number from 0 to 2³² − 1.")


def sample_token(
    logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Chooses each row's next token by its own random key, independently of other rows.

    Args:
      logits_BxV: float32.
      keys_B: A random key for each row.
      sampling: The settings; the seed is in the keys.
      vocab_size: Ids from here on are padding and never chosen.

    Returns:
      int32 [B], the tokens, and float32 [B], their log-probabilities under the model, before
      temperature, top-k and top-p.
    """
    is_id_V = jnp.arange(logits_BxV.shape[1]) < vocab_size
    logits_BxV = jnp.where(is_id_V[None], logits_BxV, -jnp.inf)
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    else:
        token_B = _draw(logits_BxV, keys_B, sampling, vocab_size)
    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BxV, axis=-1)


def _draw(
    logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling, vocab_size: int
) -> jax.Array:
    """Samples tokens at random; N is the number of tokens after top-k."""
    count = min(sampling.top_k or vocab_size, vocab_size)
    if count == vocab_size and sampling.top_p == 1:
        return _categorical(logits_BxV / sampling.temperature, keys_B)
    # Descending, and stable.
    logits_BxN, ids_BxN = jax.lax.top_k(logits_BxV, count)
    logits_BxN = logits_BxN / sampling.temperature
    if sampling.top_p < 1:
        share_BxN = jax.nn.softmax(logits_BxN, axis=-1)
        before_BxN = jnp.cumsum(share_BxN, axis=-1) - share_BxN
        # The first token always is, even if top_p rounds to 0 in float32.
        in_nucleus_BxN = (before_BxN < sampling.top_p).at[:, 0].set(True)
        logits_BxN = jnp.where(in_nucleus_BxN, logits_BxN, -jnp.inf)
    rank_B = _categorical(logits_BxN, keys_B)
    return jnp.take_along_axis(ids_BxN, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _categorical(logits_BxN: jax.Array, keys_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxN).astype(jnp.int32)
