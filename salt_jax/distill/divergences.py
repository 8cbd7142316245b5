"""Divergences between student and teacher: log p and log q of each outcome in, its part of it out.

A divergence is a sum over outcomes of one function of the student's log p and the teacher's log q.
That function is all of it: `losses.py` sums it over whole logits, `chunk_gradient.py` over a chunk
and finds its derivative by log p as well. Outcomes are the ids, or a few ids and the rest as one.

Since Σ p is 1, the same multiple of p in all derivatives changes no gradient of the logits. What
lax.stop_gradient leaves out of the derivatives below is that, p or 0: it only saves time.
"""

import dataclasses
import math
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.errors import InputError

# Stands for log 0. Finite, so that 0 · log 0 is 0 and not NaN, in values and in gradients.
LOG_ZERO = -1e30


class Divergence(Protocol):
    """A function of arrays of one shape, element by element: a function or a dataclass of settings.

    It is called within jitted programs and differentiated, so it is made of jax.numpy. Of an
    outcome without probability it gets LOG_ZERO. Where the sum over outcomes of its derivatives by
    log p is a constant, it may say so as the attribute `slope_sum`, which saves summing them.
    """

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """Each outcome's part of the divergence, in nats: log p, the student's, and log q."""
        ...


@dataclasses.dataclass(frozen=True)
class ForwardKL:
    """-Σ q log p, the cross-entropy to the soft label: KL(q ‖ p) plus a constant."""

    slope_sum: ClassVar[float] = -1.0  # Σ -q

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return -jnp.exp(log_q) * log_p


@dataclasses.dataclass(frozen=True)
class ReverseKL:
    """KL(p ‖ q) = Σ p (log p - log q)."""

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return jnp.exp(log_p) * lax.stop_gradient(log_p - log_q)


@dataclasses.dataclass(frozen=True)
class JensenShannon:
    """β KL(q ‖ m) + (1 - β) KL(p ‖ m) with m = β q + (1 - β) p: the generalised Jensen-Shannon
    divergence of arXiv 2306.13649.

    Attributes:
        beta: β, within (0, 1).
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise InputError(
                f"JensenShannon.beta is {self.beta}; set it between 0 and 1, both excluded."
            )

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        beta = self.beta
        log_m = jnp.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
        from_q = beta * jnp.exp(log_q) * (log_q - log_m)
        from_p = (1.0 - beta) * jnp.exp(log_p) * lax.stop_gradient(log_p - log_m)
        return lax.stop_gradient(from_q) + from_p


def needs_every_id(divergence: Divergence) -> bool:
    """Whether it is infinite where the teacher gives probability 0 and the student doesn't."""
    with jax.ensure_compile_time_eval():
        part = divergence(jnp.log(jnp.full(1, 0.5)), jnp.full(1, LOG_ZERO))
        return not bool(jnp.all(jnp.abs(part) < math.sqrt(-LOG_ZERO)))
