"""Divergences between student and teacher, as elementwise functions of log p and log q.

A divergence is the sum over outcomes of a function of the student's log p and the teacher's log q.
`token_losses.py` computes the sum, over ids or over the teacher's top k and the rest as one
outcome, and differentiates the function by log p.

Since Σ p is 1, adding the same multiple of p to all derivatives changes no gradient by the logits.
The lax.stop_gradient calls below drop such a multiple, p or 0, only to save time.
"""

import dataclasses
import math
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.errors import InputError

# Used for log 0. Finite, so that 0 · log 0 is 0 and not NaN, in values and in gradients.
LOG_ZERO = -1e30


class Divergence(Protocol):
    """An elementwise function of two arrays of one shape: a function, or a dataclass of settings.

    It is jitted and differentiated: use jax.numpy. The log of probability 0 is LOG_ZERO. If its
    derivatives by log p sum to a constant over all outcomes, an attribute `slope_sum` with that
    constant saves summing them.
    """

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """Each outcome's part of the divergence, in nats; p is the student's, q the teacher's."""
        ...


@dataclasses.dataclass(frozen=True)
class ForwardKL:
    """-Σ q log p, the cross-entropy with the soft label: KL(q ‖ p) plus a constant."""

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
    """Whether it is infinite where q is 0 and p is not."""
    with jax.ensure_compile_time_eval():
        part = divergence(jnp.log(jnp.full(1, 0.5)), jnp.full(1, LOG_ZERO))
        return not bool(jnp.all(jnp.abs(part) < math.sqrt(-LOG_ZERO)))
