"""The loss of each token and its gradient by the student's logits, by the formulas of `losses.py`.

`TokenLosses` computes both for a chunk of tokens and one device's part of the vocabulary, as
`chunked_loss.py` needs them. `token_losses` computes the loss from whole [B, L, V] logits, to be
differentiated by jax.

With h = ∂soft/∂log p, which autodiff computes for any divergence (-q for ForwardKL's -q log p), the
chain rule gives

    ∂soft/∂z = (h - p · Σ h) / T

Over k + 1 outcomes (teacher_top_k, soft labels), h of the rest is divided among its ids in
proportion to their p.

Ids from vocab_size on, which pad V up to a round size, are masked out of every softmax and get
gradients of exactly 0. All arithmetic is in float32 (float64 for float64 logits). An id counts as a
model's most likely one if no other has a greater logit, so there may be several.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.distill.divergences import Divergence
from salt_jax.distill.gates import TaughtTokens, truth_in_labels
from salt_jax.distill.head_sharding import VocabularyPart
from salt_jax.distill.losses import LossConfig, SoftLabels, check_vocab_size, kept_labels


class LogSums(NamedTuple):
    """The intermediate values of `TokenLosses.values` that `gradient` needs, [C] each.

    Attributes:
      log_z: log Σ exp z.
      student: log Σ exp (z / T); like all below, only with a teacher.
      h: Σ h over all outcomes.
      teacher: log Σ exp (t / τ), if soft is over the whole vocabulary.
      outcomes: If soft is over K + 1 outcomes, the ids [C, K], h [C, K + 1], log p of the rest [C].
      omega: ω of each token, if the loss has a gate.
    """

    log_z: jax.Array
    student: jax.Array | None = None
    h: jax.Array | None = None
    teacher: jax.Array | None = None
    outcomes: tuple[jax.Array, jax.Array, jax.Array] | None = None
    omega: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """The losses of C tokens from the student's logits z_CxV and the teacher's.

    The teacher's are logits t_CxV, soft labels, or None without a teacher.

    Attributes:
      config: The loss.
      omega: ω, a scalar, or [C] if it differs between tokens.
      vocabulary: The student's ids, or this device's part of them.
      teacher_vocabulary: The teacher's ids, which may lack the last of the student's.
    """

    config: LossConfig
    omega: jax.Array
    vocabulary: VocabularyPart
    teacher_vocabulary: VocabularyPart

    def values(
        self, z_CxV: jax.Array, taught: jax.Array | SoftLabels | None, targets_C: jax.Array
    ) -> tuple[dict[str, jax.Array], LogSums]:
        """The values of `token_losses`, [C] each, and the intermediate values of the gradient."""
        vocabulary, config, omega = self.vocabulary, self.config, self.omega
        largest_C = vocabulary.max(z_CxV)
        log_z_C = vocabulary.log_sum_exp(z_CxV, largest_C)
        truth_C = vocabulary.at(z_CxV, targets_C)
        hard_C = log_z_C - truth_C
        z_loss_C = config.z_loss * jnp.square(log_z_C)
        values = {"hard": hard_C, "correct": truth_C >= largest_C}
        if taught is None:
            return {**values, "loss": hard_C + z_loss_C}, LogSums(log_z_C)

        student_C = log_z_C
        if config.student_temperature != 1.0:
            student_C = _log_norm(vocabulary, z_CxV, largest_C, config.student_temperature)
        norms = LogSums(log_z_C, student_C)
        if isinstance(taught, SoftLabels):
            assert taught.teacher_hard is not None, "stored labels have the teacher's loss"
            soft_C, norms = self._soft_of_labels(z_CxV, taught, norms)
            teacher_hard_C = taught.teacher_hard
            agreement_C = vocabulary.at(z_CxV, taught.ids[:, 0]) >= largest_C
        else:
            most_C = vocabulary.max(taught)
            soft_C, norms = self._soft(z_CxV, taught, most_C, norms)
            if config.gradient_cosine:
                values["gradient_cosine"] = self._gradient_cosine(z_CxV, taught, targets_C, norms)
            teacher_hard_C = vocabulary.log_sum_exp(taught, most_C)
            teacher_hard_C -= vocabulary.at(taught, targets_C)
            # Only an id that is the largest of both reaches the sum of the two maxima (up to
            # rounding): cheaper than comparing ids.
            rounding_C = 4 * jnp.finfo(z_CxV.dtype).eps * (jnp.abs(largest_C) + jnp.abs(most_C))
            agreement_C = vocabulary.max(z_CxV + taught) >= largest_C + most_C - rounding_C
        by_teacher = {"soft": soft_C, "teacher_hard": teacher_hard_C, "agreement": agreement_C}
        if config.gate is not None:
            in_top = functools.partial(self._truth_in_top, taught, targets_C)
            gate_C = config.gate(TaughtTokens(hard_C, teacher_hard_C, in_top))
            by_teacher["gate"] = lax.stop_gradient(gate_C.astype(hard_C.dtype))
            omega = omega * by_teacher["gate"]
            norms = norms._replace(omega=omega)
        loss_C = (1.0 - omega) * hard_C + omega * soft_C + z_loss_C
        return {**values, **by_teacher, "loss": loss_C}, norms

    def gradient(
        self,
        z_CxV: jax.Array,
        taught: jax.Array | SoftLabels | None,
        targets_C: jax.Array,
        norms: LogSums,
    ) -> jax.Array:
        """The gradient of loss by z, [C, V].

        The barrier makes XLA compute all probabilities again: sharing those of `values` would write
        and read [C, V] arrays, which is slower.
        """
        norms = lax.optimization_barrier(norms)
        omega = self.omega if norms.omega is None else norms.omega
        omega = omega[:, None] if omega.ndim else omega
        hard_share = 1.0 if taught is None else 1.0 - omega
        p_CxV = jnp.exp(z_CxV - norms.log_z[:, None])
        d_z_CxV = (hard_share + 2.0 * self.config.z_loss * norms.log_z[:, None]) * p_CxV
        d_z_CxV -= jnp.where(self.vocabulary.is_id(targets_C), hard_share, 0.0)
        if norms.h is None:
            return d_z_CxV

        log_p_CxV = self._log_p(z_CxV, norms)
        if norms.outcomes is not None:
            ids_CxK, h_CxO, rest_C = norms.outcomes
            share_CxV = jnp.exp(jnp.minimum(log_p_CxV - rest_C[:, None], 0.0))
            h_CxV = self.vocabulary.put(h_CxO[:, -1:] * share_CxV, ids_CxK, h_CxO[:, :-1])
        else:
            assert isinstance(taught, jax.Array), "soft is over the teacher's whole vocabulary"
            _, h_CxV = _with_slope(self.config.divergence, log_p_CxV, self._log_q(taught, norms))
        d_soft_CxV = h_CxV - jnp.exp(log_p_CxV) * norms.h[:, None]
        return d_z_CxV + omega * self._scale / self.config.student_temperature * d_soft_CxV

    def _soft(
        self, z_CxV: jax.Array, t_CxV: jax.Array, most_C: jax.Array, norms: LogSums
    ) -> tuple[jax.Array, LogSums]:
        """The soft term, [C], of a teacher whose largest logits are most_C."""
        config, vocabulary = self.config, self.vocabulary
        teacher_C = _log_norm(self.teacher_vocabulary, t_CxV, most_C, config.teacher_temperature)
        norms = norms._replace(teacher=teacher_C)
        log_q_CxV = self._log_q(t_CxV, norms)
        if 0 < config.teacher_top_k < self.teacher_vocabulary.vocab_size:
            log_q_CxK, ids_CxK = vocabulary.largest(log_q_CxV, config.teacher_top_k)
            labels = SoftLabels(ids_CxK, log_q_CxK, vocabulary.log_rest(log_q_CxV, ids_CxK))
            return self._soft_of_labels(z_CxV, labels, norms)
        value_CxV, h_CxV = _with_slope(config.divergence, self._log_p(z_CxV, norms), log_q_CxV)
        known = getattr(config.divergence, "slope_sum", None)
        h_C = vocabulary.sum(h_CxV) if known is None else jnp.full_like(most_C, known)
        return self._scale * vocabulary.sum(value_CxV), norms._replace(h=h_C)

    def _soft_of_labels(
        self, z_CxV: jax.Array, labels: SoftLabels, norms: LogSums
    ) -> tuple[jax.Array, LogSums]:
        """The soft term, [C], over O = K + 1 outcomes."""
        log_p_CxV = self._log_p(z_CxV, norms)
        rest_C = self.vocabulary.log_rest(log_p_CxV, labels.ids)
        log_p_CxO = _joined(self.vocabulary.at(log_p_CxV, labels.ids), rest_C)
        log_q_CxO = _joined(labels.log_q, labels.rest)
        value_CxO, h_CxO = _with_slope(self.config.divergence, log_p_CxO, log_q_CxO)
        norms = norms._replace(h=jnp.sum(h_CxO, axis=-1), outcomes=(labels.ids, h_CxO, rest_C))
        return self._scale * jnp.sum(value_CxO, axis=-1), norms

    def _gradient_cosine(
        self, z_CxV: jax.Array, t_CxV: jax.Array, targets_C: jax.Array, norms: LogSums
    ) -> jax.Array:
        """cos(p - q, p - onehot(y)) with p at temperature 1 and q at τ, [C]."""
        vocabulary = self.vocabulary
        p_CxV = jnp.exp(z_CxV - norms.log_z[:, None])
        q_CxV = jnp.exp(self._log_q(t_CxV, norms))
        is_truth_CxV = vocabulary.is_id(targets_C).astype(p_CxV.dtype)
        soft_CxV, hard_CxV = p_CxV - q_CxV, p_CxV - is_truth_CxV
        both_C = vocabulary.sum(soft_CxV * hard_CxV)
        squares_C = [vocabulary.sum(jnp.square(x)) for x in (soft_CxV, hard_CxV)]
        tiny = jnp.finfo(p_CxV.dtype).tiny
        cosine_C = both_C / jnp.sqrt(jnp.maximum(squares_C[0] * squares_C[1], tiny))
        return lax.stop_gradient(cosine_C)

    def _truth_in_top(
        self, taught: jax.Array | SoftLabels, targets_C: jax.Array, k: int
    ) -> jax.Array:
        if isinstance(taught, SoftLabels):
            return truth_in_labels(taught.ids, targets_C, k)
        more_likely_CxV = taught > self.vocabulary.at(taught, targets_C)[:, None]
        return self.vocabulary.sum(more_likely_CxV.astype(jnp.float32)) < k

    @property
    def _scale(self) -> float:
        config = self.config
        return config.teacher_temperature**2 if config.scale_by_temperature_squared else 1.0

    def _log_p(self, z_CxV: jax.Array, norms: LogSums) -> jax.Array:
        return _log_probabilities(
            self.vocabulary, z_CxV, norms.student, self.config.student_temperature
        )

    def _log_q(self, t_CxV: jax.Array, norms: LogSums) -> jax.Array:
        return _log_probabilities(
            self.teacher_vocabulary, t_CxV, norms.teacher, self.config.teacher_temperature
        )


def token_losses(
    student_logits_BxLxV: jax.Array,
    teacher_logits_BxLxV: jax.Array | None,
    targets_BxL: jax.Array,
    omega: jax.Array | float,
    config: LossConfig,
    vocab_size: int,
    soft_labels: SoftLabels | None = None,
    teacher_vocab_size: int | None = None,
) -> dict[str, jax.Array]:
    """Losses in nats and metrics of every token, from whole logits.

    Args:
      student_logits_BxLxV: Any float dtype; V >= vocab_size.
      teacher_logits_BxLxV: Its V may differ, but >= teacher_vocab_size. None gives plain
        cross-entropy, whatever ω is.
      targets_BxL: int32, within [0, vocab_size).
      omega: ω, a traced scalar, or [B, 1] if it differs between rows.
      config: Temperatures, divergence, z-loss.
      vocab_size: Number of ids in use.
      soft_labels: [B, L, …], instead of teacher logits, at config's temperature.
      teacher_vocab_size: Number of ids that the teacher has, the vocabulary's first ones; None for
        all. It gives the others probability 0.

    Returns:
      [B, L] each: loss, hard, correct (1 where the target is the student's most likely id, else 0);
      with a teacher also soft, teacher_hard (the teacher's -log q[y] at temperature 1),
      agreement (1 where a most likely id of the student is one of the teacher's) and, if the loss
      has them, gate (its share of ω) and gradient_cosine.

    Raises:
      InputError: See `check_vocab_size`; or more top ids than the soft labels have.
    """
    teacher_ids = None if teacher_logits_BxLxV is None else teacher_logits_BxLxV.shape[-1]
    teacher_vocab_size, ids = teacher_vocab_size or vocab_size, student_logits_BxLxV.shape[-1]
    check_vocab_size(config, vocab_size, ids, teacher_vocab_size, teacher_ids)
    vocabularies = [VocabularyPart(None, ids, size) for size in (vocab_size, teacher_vocab_size)]
    float_dtype = jnp.promote_types(student_logits_BxLxV.dtype, jnp.float32)

    def tokens(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    z_CxV = vocabularies[0].mask(tokens(student_logits_BxLxV).astype(float_dtype))
    taught: jax.Array | SoftLabels | None = None
    if soft_labels is not None:
        taught = jax.tree.map(tokens, kept_labels(soft_labels, config, float_dtype))
    elif teacher_logits_BxLxV is not None:
        t_CxV = tokens(teacher_logits_BxLxV).astype(float_dtype)[:, :ids]
        t_CxV = jnp.pad(t_CxV, ((0, 0), (0, ids - t_CxV.shape[1])))
        taught = vocabularies[1].mask(t_CxV)
    omega_C = jnp.broadcast_to(jnp.asarray(omega, float_dtype), targets_BxL.shape).ravel()
    losses = TokenLosses(config, omega_C, *vocabularies)
    values, _ = losses.values(z_CxV, taught, targets_BxL.ravel())
    shape = targets_BxL.shape
    return {name: value.reshape(shape).astype(float_dtype) for name, value in values.items()}


def _log_norm(
    vocabulary: VocabularyPart, x_CxV: jax.Array, most_C: jax.Array, temperature: float
) -> jax.Array:
    """log Σ exp (x / temperature), [C], of logits whose largest are most_C."""
    x_CxV = vocabulary.mask(_divided(x_CxV, temperature))
    return vocabulary.log_sum_exp(x_CxV, most_C / temperature)


def _log_probabilities(
    vocabulary: VocabularyPart, x_CxV: jax.Array, norm_C: jax.Array | None, temperature: float
) -> jax.Array:
    assert norm_C is not None, "the norm is computed before"
    # Masked again, since the temperature has scaled the padding's LOG_ZERO.
    return vocabulary.mask(_divided(x_CxV, temperature) - norm_C[:, None])


def _divided(logits_CxV: jax.Array, temperature: float) -> jax.Array:
    """logits / temperature behind a barrier, so that XLA recomputes it at each use."""
    if temperature == 1.0:
        return logits_CxV
    inverse = lax.optimization_barrier(jnp.asarray(1.0 / temperature, logits_CxV.dtype))
    return logits_CxV * inverse


def _joined(log_x_CxK: jax.Array, rest_C: jax.Array) -> jax.Array:
    return jnp.concatenate([log_x_CxK, rest_C[:, None]], axis=-1)


def _with_slope(
    divergence: Divergence, log_p: jax.Array, log_q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The value of the divergence for each outcome, and its derivative h."""
    return jax.jvp(lambda log_p: divergence(log_p, log_q), (log_p,), (jnp.ones_like(log_p),))
