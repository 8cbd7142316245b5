"""One chunk of tokens: logits [C, V] in; losses, and their gradient by the logits, out.

With p = softmax(z / T) and h = ∂soft/∂log p, which autodiff finds of any divergence (-q of
ForwardKL's -q log p), by the chain rule

    ∂soft/∂z = (h - p · Σ h) / T

Of k + 1 outcomes (teacher_top_k, soft labels), h of the rest falls to its ids in proportion to
their p. V is one device's part of the vocabulary; sums over it go through VocabularyPart.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.distill.divergences import LOG_ZERO, Divergence
from salt_jax.distill.head_sharding import VocabularyPart
from salt_jax.distill.losses import LossConfig, SoftLabels


class Norms(NamedTuple):
    """What makes probabilities of a chunk's logits, [C] each; the last four with a teacher only.

    Attributes:
        log_z: log Σ exp z.
        student: log Σ exp (z / T).
        teacher: log Σ exp (t / τ).
        h: Σ h over all outcomes.
        labels: where the teacher's word is on k + 1 outcomes, the k ids and their q.
        rest: of the last outcome, log p and h.
    """

    log_z: jax.Array
    student: jax.Array | None = None
    teacher: jax.Array | None = None
    h: jax.Array | None = None
    labels: SoftLabels | None = None
    rest: tuple[jax.Array, jax.Array] | None = None


class ChunkLoss:
    """The loss of a chunk, from the student's logits z_CxV and the teacher's word.

    That is the teacher's logits t_CxV, stored soft labels, or None. ω is a scalar, or [C] where
    tokens have one of their own. The teacher's vocabulary may lack the last ids of the student's.
    """

    def __init__(
        self,
        config: LossConfig,
        omega: jax.Array,
        vocabulary: VocabularyPart,
        teacher_vocabulary: VocabularyPart,
    ) -> None:
        self._config = config
        self._omega = omega
        self._vocabulary = vocabulary
        self._teacher_vocabulary = teacher_vocabulary
        top_k = config.teacher_top_k
        self._top_k = top_k if top_k < teacher_vocabulary.vocab_size else 0
        squared = config.scale_by_temperature_squared
        self._scale = config.teacher_temperature**2 if squared else 1.0

    def values(
        self, z_CxV: jax.Array, taught: jax.Array | SoftLabels | None, targets_C: jax.Array
    ) -> tuple[dict[str, jax.Array], Norms]:
        """`losses.token_losses` of the chunk, [C] each."""
        vocabulary, omega = self._vocabulary, self._omega
        largest_C = vocabulary.max(z_CxV)
        log_z_C = vocabulary.log_sum_exp(z_CxV, largest_C)
        truth_C = vocabulary.at(z_CxV, targets_C)
        hard_C = log_z_C - truth_C
        z_loss_C = self._config.z_loss * jnp.square(log_z_C)
        values = {"hard": hard_C, "correct": truth_C >= largest_C}
        if taught is None:
            return {**values, "loss": hard_C + z_loss_C}, Norms(log_z_C)

        norms = self._with_student(Norms(log_z_C), z_CxV, largest_C)
        if isinstance(taught, SoftLabels):
            soft_C, norms = self._soft_of_labels(z_CxV, norms._replace(labels=taught))
            assert taught.teacher_hard is not None, "stored labels have the teacher's loss"
            values |= {"soft": soft_C, "teacher_hard": taught.teacher_hard}
            values["agreement"] = vocabulary.at(z_CxV, taught.ids[:, 0]) >= largest_C
            loss_C = (1.0 - omega) * hard_C + omega * soft_C + z_loss_C
            return {**values, "loss": loss_C}, norms

        t_CxV, most_C = taught, vocabulary.max(taught)
        soft_C, norms = self._soft(z_CxV, t_CxV, norms, most_C)
        teacher_log_z_C = vocabulary.log_sum_exp(t_CxV, most_C)
        values["soft"] = soft_C
        values["teacher_hard"] = teacher_log_z_C - vocabulary.at(t_CxV, targets_C)
        # To rounding, the sum is largest where both are: cheaper than to look for such an id.
        rounding_C = 4 * jnp.finfo(z_CxV.dtype).eps * (jnp.abs(largest_C) + jnp.abs(most_C))
        sum_C = vocabulary.max(z_CxV + t_CxV)
        values["agreement"] = sum_C >= largest_C + most_C - rounding_C
        return {**values, "loss": (1.0 - omega) * hard_C + omega * soft_C + z_loss_C}, norms

    def gradient(
        self,
        z_CxV: jax.Array,
        taught: jax.Array | SoftLabels | None,
        targets_C: jax.Array,
        norms: Norms,
    ) -> jax.Array:
        """The loss's gradient by z, [C, V].

        It makes all probabilities anew: XLA, which would keep those that `values` made, [C, V] each
        and slower to write and read than to compute, is kept from seeing that they are the same.
        """
        norms = lax.optimization_barrier(norms)
        # For the vocabulary to be added.
        omega = self._omega[:, None] if self._omega.ndim else self._omega
        hard_share = 1.0 if taught is None else 1.0 - omega
        p_CxV = jnp.exp(z_CxV - norms.log_z[:, None])
        d_z_CxV = (hard_share + 2.0 * self._config.z_loss * norms.log_z[:, None]) * p_CxV
        d_z_CxV -= jnp.where(self._vocabulary.is_id(targets_C), hard_share, 0.0)
        if taught is None or norms.h is None:
            return d_z_CxV

        log_p_CxV = self._log_p(z_CxV, norms)
        if norms.labels is not None and norms.rest is not None:
            ids_CxK, (rest_log_p_C, rest_h_C) = norms.labels.ids, norms.rest
            log_p_CxK = self._vocabulary.at(log_p_CxV, ids_CxK)
            _, h_CxK = _with_slope(self._config.divergence, log_p_CxK, norms.labels.log_q)
            share_CxV = jnp.exp(jnp.minimum(log_p_CxV - rest_log_p_C[:, None], 0.0))
            h_CxV = self._vocabulary.put(rest_h_C[:, None] * share_CxV, ids_CxK, h_CxK)
        else:
            assert isinstance(taught, jax.Array), "labels have their norms"
            _, h_CxV = _with_slope(self._config.divergence, log_p_CxV, self._log_q(taught, norms))
        d_soft_CxV = h_CxV - jnp.exp(log_p_CxV) * norms.h[:, None]
        return d_z_CxV + omega * self._scale / self._config.student_temperature * d_soft_CxV

    def _soft(
        self, z_CxV: jax.Array, t_CxV: jax.Array, norms: Norms, most_C: jax.Array
    ) -> tuple[jax.Array, Norms]:
        """soft [C], times τ² where that is asked for."""
        config, vocabulary = self._config, self._vocabulary
        temperature = config.teacher_temperature
        teacher_C = _log_sum_exp(self._teacher_vocabulary, t_CxV, most_C, temperature)
        norms = norms._replace(teacher=teacher_C)
        log_q_CxV = self._log_q(t_CxV, norms)
        if self._top_k:
            log_q_CxK, ids_CxK = vocabulary.largest(log_q_CxV, self._top_k)
            rest_C = self._rest(log_q_CxV, ids_CxK)
            labels = SoftLabels(ids_CxK, log_q_CxK, rest_C)
            return self._soft_of_labels(z_CxV, norms._replace(labels=labels))

        value_CxV, h_CxV = _with_slope(config.divergence, self._log_p(z_CxV, norms), log_q_CxV)
        known = getattr(config.divergence, "slope_sum", None)
        h_C = vocabulary.sum(h_CxV) if known is None else jnp.full_like(most_C, known)
        return self._scale * vocabulary.sum(value_CxV), norms._replace(h=h_C)

    def _soft_of_labels(self, z_CxV: jax.Array, norms: Norms) -> tuple[jax.Array, Norms]:
        """The same on k + 1 outcomes, those of norms.labels."""
        labels = norms.labels
        assert labels is not None, "the labels are set"
        log_p_CxV = self._log_p(z_CxV, norms)
        log_p_CxK = self._vocabulary.at(log_p_CxV, labels.ids)
        rest_log_p_C = self._rest(log_p_CxV, labels.ids)
        value_CxK, h_CxK = _with_slope(self._config.divergence, log_p_CxK, labels.log_q)
        rest_value_C, rest_h_C = _with_slope(self._config.divergence, rest_log_p_C, labels.rest)
        soft_C = jnp.sum(value_CxK, axis=-1) + rest_value_C
        h_C = jnp.sum(h_CxK, axis=-1) + rest_h_C
        return self._scale * soft_C, norms._replace(h=h_C, rest=(rest_log_p_C, rest_h_C))

    def _rest(self, log_x_CxV: jax.Array, ids_CxK: jax.Array) -> jax.Array:
        """log of what all but these ids have, [C]."""
        # Summed over the others: 1 - Σ of the k has no digits left where the k have nearly all.
        top_CxV = self._vocabulary.are_among(ids_CxK)
        return self._vocabulary.log_sum_exp(jnp.where(top_CxV, LOG_ZERO, log_x_CxV))

    def _with_student(self, norms: Norms, z_CxV: jax.Array, largest_C: jax.Array) -> Norms:
        temperature = self._config.student_temperature
        if temperature == 1.0:
            return norms._replace(student=norms.log_z)
        student_C = _log_sum_exp(self._vocabulary, z_CxV, largest_C, temperature)
        return norms._replace(student=student_C)

    def _log_p(self, z_CxV: jax.Array, norms: Norms) -> jax.Array:
        """The student's log probabilities at its temperature."""
        assert norms.student is not None, "the student's norm is set"
        # Masked anew: a temperature may have moved the padding's "log 0" out of range.
        z_CxV = _divided(z_CxV, self._config.student_temperature)
        return self._vocabulary.mask(z_CxV - norms.student[:, None])

    def _log_q(self, t_CxV: jax.Array, norms: Norms) -> jax.Array:
        """The teacher's."""
        assert norms.teacher is not None, "the teacher's norm is set"
        t_CxV = _divided(t_CxV, self._config.teacher_temperature)
        return self._teacher_vocabulary.mask(t_CxV - norms.teacher[:, None])


def _log_sum_exp(
    vocabulary: VocabularyPart, x_CxV: jax.Array, most_C: jax.Array, temperature: float
) -> jax.Array:
    """log Σ exp (x / temperature), [C], of logits whose largest are most_C."""
    return vocabulary.log_sum_exp(
        vocabulary.mask(_divided(x_CxV, temperature)), most_C / temperature
    )


def _divided(logits_CxV: jax.Array, temperature: float) -> jax.Array:
    """logits / temperature, to XLA another value at each use; see `ChunkLoss.gradient`."""
    if temperature == 1.0:
        return logits_CxV
    inverse = lax.optimization_barrier(jnp.asarray(1.0 / temperature, logits_CxV.dtype))
    return logits_CxV * inverse


def _with_slope(
    divergence: Divergence, log_p: jax.Array, log_q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each outcome's part of the divergence, and its h."""
    return jax.jvp(lambda log_p: divergence(log_p, log_q), (log_p,), (jnp.ones_like(log_p),))
