"""One chunk of tokens: logits [C, V] in; losses, and their gradient by the logits, out.

With p = softmax(z / T), q the teacher's softmax and h = p · ∂soft/∂p, by the chain rule

    ∂soft/∂z = (h - p · Σ h) / T
    forward_kl      h = -q
    reverse_kl      h = p (log p - log q)
    jensen_shannon  h = (1 - β) p (log p - log m)

Of teacher_top_k's k + 1 outcomes, h of the rest falls to its ids in proportion to their p. V is one
device's part of the vocabulary; sums over it go through VocabularyPart.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.distill.head_sharding import VocabularyPart
from salt_jax.distill.losses import LOG_ZERO, LossConfig


class Norms(NamedTuple):
    """What makes probabilities of a chunk's logits, [C] each; the last four with a teacher only.

    Attributes:
        log_z: log Σ exp z.
        student: log Σ exp (z / T).
        teacher: log Σ exp (t / τ).
        h: Σ h over all outcomes.
        rest: with teacher_top_k, log p of the rest and h of the rest.
    """

    log_z: jax.Array
    student: jax.Array | None = None
    teacher: jax.Array | None = None
    h: jax.Array | None = None
    rest: tuple[jax.Array, jax.Array] | None = None


class ChunkLoss:
    """The loss of a chunk: z_CxV the student's logits, t_CxV the teacher's or None."""

    def __init__(self, config: LossConfig, omega: jax.Array, vocabulary: VocabularyPart) -> None:
        self._config = config
        self._omega = omega
        self._vocabulary = vocabulary
        top_k = config.teacher_top_k
        self._top_k = top_k if top_k < vocabulary.vocab_size else 0
        squared = config.scale_by_temperature_squared
        self._scale = config.teacher_temperature**2 if squared else 1.0

    def values(
        self, z_CxV: jax.Array, t_CxV: jax.Array | None, targets_C: jax.Array
    ) -> tuple[dict[str, jax.Array], Norms]:
        """`losses.token_losses` of the chunk, [C] each."""
        vocabulary, omega = self._vocabulary, self._omega
        largest_C = vocabulary.max(z_CxV)
        log_z_C = vocabulary.log_sum_exp(z_CxV, largest_C)
        truth_C = vocabulary.at(z_CxV, targets_C)
        hard_C = log_z_C - truth_C
        z_loss_C = self._config.z_loss * jnp.square(log_z_C)
        values = {"hard": hard_C, "correct": truth_C >= largest_C}
        if t_CxV is None:
            return {**values, "loss": hard_C + z_loss_C}, Norms(log_z_C)

        most_C = vocabulary.max(t_CxV)
        soft_C, norms = self._soft(z_CxV, t_CxV, Norms(log_z_C), largest_C, most_C)
        teacher_log_z_C = vocabulary.log_sum_exp(t_CxV, most_C)
        values["soft"] = soft_C
        values["teacher_hard"] = teacher_log_z_C - vocabulary.at(t_CxV, targets_C)
        # To rounding, the sum is largest where both are: cheaper than to look for such an id.
        rounding_C = 4 * jnp.finfo(z_CxV.dtype).eps * (jnp.abs(largest_C) + jnp.abs(most_C))
        sum_C = vocabulary.max(z_CxV + t_CxV)
        values["agreement"] = sum_C >= largest_C + most_C - rounding_C
        return {**values, "loss": (1.0 - omega) * hard_C + omega * soft_C + z_loss_C}, norms

    def gradient(
        self, z_CxV: jax.Array, t_CxV: jax.Array | None, targets_C: jax.Array, norms: Norms
    ) -> jax.Array:
        """The loss's gradient by z, [C, V].

        It makes all probabilities anew: XLA, which would keep those that `values` made, [C, V] each
        and slower to write and read than to compute, is kept from seeing that they are the same.
        """
        norms = lax.optimization_barrier(norms)
        hard_share = 1.0 if t_CxV is None else 1.0 - self._omega
        p_CxV = jnp.exp(z_CxV - norms.log_z[:, None])
        d_z_CxV = (hard_share + 2.0 * self._config.z_loss * norms.log_z)[:, None] * p_CxV
        d_z_CxV -= jnp.where(self._vocabulary.is_id(targets_C), hard_share, 0.0)
        if t_CxV is None or norms.h is None:
            return d_z_CxV

        log_p_CxV, log_q_CxV = self._log_probabilities(z_CxV, t_CxV, norms)
        _, h_CxV = _divergence(log_p_CxV, log_q_CxV, self._config)
        if norms.rest is not None:
            rest_log_p_C, rest_h_C = norms.rest
            share_CxV = jnp.exp(jnp.minimum(log_p_CxV - rest_log_p_C[:, None], 0.0))
            top_CxV = self._vocabulary.top_k(log_q_CxV, self._top_k)
            h_CxV = jnp.where(top_CxV, h_CxV, rest_h_C[:, None] * share_CxV)
        d_soft_CxV = h_CxV - jnp.exp(log_p_CxV) * norms.h[:, None]
        return d_z_CxV + self._omega * self._scale / self._config.student_temperature * d_soft_CxV

    def _soft(
        self,
        z_CxV: jax.Array,
        t_CxV: jax.Array,
        norms: Norms,
        largest_C: jax.Array,
        most_C: jax.Array,
    ) -> tuple[jax.Array, Norms]:
        """soft [C], times τ² where that is asked for."""
        config, vocabulary = self._config, self._vocabulary

        def log_sum_exp(x_CxV: jax.Array, most_C: jax.Array, temperature: float) -> jax.Array:
            cooled_CxV = vocabulary.mask(_divided(x_CxV, temperature))
            return vocabulary.log_sum_exp(cooled_CxV, most_C / temperature)

        one = config.student_temperature == 1.0
        norms = norms._replace(
            student=norms.log_z
            if one
            else log_sum_exp(z_CxV, largest_C, config.student_temperature),
            teacher=log_sum_exp(t_CxV, most_C, config.teacher_temperature),
        )
        log_p_CxV, log_q_CxV = self._log_probabilities(z_CxV, t_CxV, norms)
        value_CxV, h_CxV = _divergence(log_p_CxV, log_q_CxV, config)
        if not self._top_k:
            # Σ -q is known.
            known = config.divergence == "forward_kl"
            h_C = -jnp.ones_like(most_C) if known else vocabulary.sum(h_CxV)
            return self._scale * vocabulary.sum(value_CxV), norms._replace(h=h_C)

        top_CxV = vocabulary.top_k(log_q_CxV, self._top_k)
        # Summed over the others: 1 - Σ of the k has no digits left where the k have nearly all.
        rest_log_p_C, rest_log_q_C = (
            vocabulary.log_sum_exp(jnp.where(top_CxV, LOG_ZERO, x)) for x in (log_p_CxV, log_q_CxV)
        )
        rest_value_C, rest_h_C = _divergence(rest_log_p_C, rest_log_q_C, config)
        soft_C = vocabulary.sum(jnp.where(top_CxV, value_CxV, 0.0)) + rest_value_C
        h_C = vocabulary.sum(jnp.where(top_CxV, h_CxV, 0.0)) + rest_h_C
        return self._scale * soft_C, norms._replace(h=h_C, rest=(rest_log_p_C, rest_h_C))

    def _log_probabilities(
        self, z_CxV: jax.Array, t_CxV: jax.Array, norms: Norms
    ) -> tuple[jax.Array, jax.Array]:
        """log p and log q, at their temperatures."""
        assert norms.student is not None, "the teacher's norms are set"
        assert norms.teacher is not None, "the teacher's norms are set"
        config, mask = self._config, self._vocabulary.mask
        # Masked anew: a temperature may have moved the padding's "log 0" out of range.
        z_CxV = _divided(z_CxV, config.student_temperature)
        t_CxV = _divided(t_CxV, config.teacher_temperature)
        return mask(z_CxV - norms.student[:, None]), mask(t_CxV - norms.teacher[:, None])


def _divided(logits_CxV: jax.Array, temperature: float) -> jax.Array:
    """logits / temperature, to XLA another value at each use; see `ChunkLoss.gradient`."""
    if temperature == 1.0:
        return logits_CxV
    inverse = lax.optimization_barrier(jnp.asarray(1.0 / temperature, logits_CxV.dtype))
    return logits_CxV * inverse


def _divergence(
    log_p: jax.Array, log_q: jax.Array, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Each outcome's part of the divergence, and its h."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if config.divergence == "forward_kl":
        return -q * log_p, -q
    if config.divergence == "reverse_kl":
        value = p * (log_p - log_q)
        return value, value
    beta = config.jsd_beta
    log_m = jnp.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
    h = (1.0 - beta) * p * (log_p - log_m)
    return beta * q * (log_q - log_m) + h, h
