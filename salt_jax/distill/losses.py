"""The losses of SALT: logits of student and teacher, targets and ω in; nats per token out.

    p = softmax(z_s / T)             student, T = student_temperature, 1 by default
    q = softmax(z_t / τ)             teacher, τ = teacher_temperature
    hard = -log softmax(z_s)[y]
    soft = a divergence of p from q  by default -Σ q log p, KL(q ‖ p) plus a constant
    loss = (1 - ω) · hard + ω · soft + z_loss · log² Σ exp z_s

These take whole [B, L, V] logits: the reference for `chunked_loss.py`, which trains. Ids from
vocab_size on, which pad V up to a round size, have no part in any softmax and get gradients of
exactly 0. All arithmetic is in float32 (float64 for float64 logits). A token's most likely ids are
those no other id has a greater logit than: equal ones count alike.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from salt_jax.distill.divergences import LOG_ZERO, Divergence, ForwardKL, needs_every_id
from salt_jax.errors import InputError

# Values that only a teacher gives.
TEACHER_VALUES = ("soft", "teacher_hard", "agreement")


class SoftLabels(NamedTuple):
    """A teacher's word on some tokens, in place of its logits: K + 1 outcomes each.

    Attributes:
        ids: int32 [..., K], the most likely ids, best first.
        log_q: [..., K], log of their probabilities over the whole vocabulary at temperature τ.
        rest: [...], log of what all other ids have together.
        teacher_hard: [...], the teacher's -log q[y] at temperature 1, nats; None where not asked.
    """

    ids: jax.Array
    log_q: jax.Array
    rest: jax.Array
    teacher_hard: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the student learns from the teacher; see the module's formulas.

    Attributes:
        teacher_temperature: τ, on the teacher's logits.
        student_temperature: T, on the student's logits, in soft alone: hard has temperature 1.
        scale_by_temperature_squared: multiply soft by τ², the convention of systems with one
            temperature on both sides.
        divergence: what soft is: ForwardKL, ReverseKL, JensenShannon of `divergences.py`, or a
            function of one's own.
        teacher_top_k: above 0, p and q are first brought onto k + 1 outcomes: the teacher's k most
            likely ids (the lower id first among equals) and the rest as one, with 1 - Σ of the k.
            Nothing is renormalised. With ForwardKL, for one,
            soft = -Σ_{top k} q log p - q_rest · log(1 - Σ_{top k} p). 0 = the whole vocabulary, or
            all that stored soft labels have.
        z_loss: λ of λ · log² Σ exp z_s, which keeps logits from drifting (T5X uses 1e-4).
        chunk_tokens: tokens whose logits a device holds at once (`chunked_loss.py`): for each
            model 4 · chunk_tokens · V bytes. Fewer tokens take less memory; matrix products want
            several hundred on a GPU or a TPU, and 128 are enough on a CPU.
    """

    teacher_temperature: float = 0.25
    student_temperature: float = 1.0
    scale_by_temperature_squared: bool = False
    divergence: Divergence = ForwardKL()  # noqa: RUF009 (frozen)
    teacher_top_k: int = 0
    z_loss: float = 0.0
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("teacher_temperature", "student_temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"LossConfig.{name} is {getattr(self, name)}; set it to a number above 0."
                )
        if not callable(self.divergence) or isinstance(self.divergence, type):
            raise InputError(
                f"LossConfig.divergence is {self.divergence!r}; set it to a divergence, such as "
                "@divergences.ForwardKL() in a gin file."
            )
        if not isinstance(self.teacher_top_k, int) or self.teacher_top_k < 0:
            raise InputError(
                f"LossConfig.teacher_top_k is {self.teacher_top_k!r}; "
                "set it to a whole number, 0 for all ids."
            )
        if not 0.0 <= self.z_loss < math.inf:
            raise InputError(f"LossConfig.z_loss is {self.z_loss}; set it to 0 or more.")
        if not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 1:
            raise InputError(
                f"LossConfig.chunk_tokens is {self.chunk_tokens!r}; "
                "set it to a whole number of at least 1."
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
    """Losses and hits of every token, in nats.

    Args:
        student_logits_BxLxV: any float dtype; V >= vocab_size.
        teacher_logits_BxLxV: its V may be another one, >= teacher_vocab_size. None = plain
            cross-entropy, whatever ω.
        targets_BxL: int32, within [0, vocab_size).
        omega: ω, a traced scalar, or [B, 1] for rows with an ω of their own.
        config: temperatures, divergence, z-loss.
        vocab_size: number of ids that mean something.
        soft_labels: in place of teacher logits, what was kept of them, at config's temperature.
        teacher_vocab_size: the teacher's ids, the first of the vocabulary's; None = all of them.
            To the others it gives probability 0.

    Returns:
        [B, L] each: loss, hard, correct (1 where the target is the student's most likely id, else
        0); with a teacher also soft, teacher_hard (the teacher's -log q[y] at temperature 1) and
        agreement (1 where a most likely id of the student is one of the teacher's).
    """
    teacher_ids = None if teacher_logits_BxLxV is None else teacher_logits_BxLxV.shape[-1]
    teacher_vocab_size = teacher_vocab_size or vocab_size
    check_vocab_size(
        config, vocab_size, student_logits_BxLxV.shape[-1], teacher_vocab_size, teacher_ids
    )
    z_BxLxV = _mask(_as_float(student_logits_BxLxV), vocab_size)
    log_z_BxL = jax.nn.logsumexp(z_BxLxV, axis=-1)
    log_p_BxLxV = z_BxLxV - log_z_BxL[..., None]
    hard_BxL = -_at(log_p_BxLxV, targets_BxL)
    largest_BxL = jnp.max(z_BxLxV, axis=-1)
    token = {"hard": hard_BxL, "correct": _at(z_BxLxV, targets_BxL) >= largest_BxL}
    loss_BxL = hard_BxL

    if teacher_logits_BxLxV is not None:
        teacher_BxLxV = _fit(_as_float(teacher_logits_BxLxV), z_BxLxV.shape[-1], teacher_vocab_size)
        if config.student_temperature != 1.0:
            log_p_BxLxV = _log_softmax(z_BxLxV / config.student_temperature, vocab_size)
        log_q_BxLxV = _log_softmax(teacher_BxLxV / config.teacher_temperature, teacher_vocab_size)
        soft_BxL = _soft_loss(log_p_BxLxV, log_q_BxLxV, config, vocab_size)
        loss_BxL = (1.0 - omega) * hard_BxL + omega * soft_BxL

        mine_BxLxV = z_BxLxV >= largest_BxL[..., None]
        theirs_BxLxV = teacher_BxLxV >= jnp.max(teacher_BxLxV, axis=-1, keepdims=True)
        teacher_log_z_BxL = jax.nn.logsumexp(teacher_BxLxV, axis=-1)
        token["soft"] = soft_BxL
        token["teacher_hard"] = teacher_log_z_BxL - _at(teacher_BxLxV, targets_BxL)
        token["agreement"] = jnp.any(mine_BxLxV & theirs_BxLxV, axis=-1)
    if soft_labels is not None:
        labels = kept_labels(soft_labels, config, z_BxLxV.dtype)
        if config.student_temperature != 1.0:
            log_p_BxLxV = _log_softmax(z_BxLxV / config.student_temperature, vocab_size)
        log_p_BxLxk = _bucketed(log_p_BxLxV, labels.ids)
        log_q_BxLxk = jnp.concatenate([labels.log_q, labels.rest[..., None]], axis=-1)
        soft_BxL = _summed(log_p_BxLxk, log_q_BxLxk, config)
        loss_BxL = (1.0 - omega) * hard_BxL + omega * soft_BxL
        assert labels.teacher_hard is not None, "stored labels have the teacher's loss"
        token["soft"], token["teacher_hard"] = soft_BxL, labels.teacher_hard
        token["agreement"] = _at(z_BxLxV, labels.ids[..., 0]) >= largest_BxL
    if config.z_loss:
        loss_BxL += config.z_loss * jnp.square(log_z_BxL)
    token["loss"] = loss_BxL
    return {name: value_BxL.astype(z_BxLxV.dtype) for name, value_BxL in token.items()}


def _soft_loss(
    log_p_BxLxV: jax.Array, log_q_BxLxV: jax.Array, config: LossConfig, vocab_size: int
) -> jax.Array:
    if 0 < config.teacher_top_k < vocab_size:
        _, ids_BxLxk = jax.lax.top_k(log_q_BxLxV, config.teacher_top_k)
        log_p_BxLxV, log_q_BxLxV = (_bucketed(x, ids_BxLxk) for x in (log_p_BxLxV, log_q_BxLxV))
    return _summed(log_p_BxLxV, log_q_BxLxV, config)


def _summed(log_p_BxLxV: jax.Array, log_q_BxLxV: jax.Array, config: LossConfig) -> jax.Array:
    soft_BxL = jnp.sum(config.divergence(log_p_BxLxV, log_q_BxLxV), axis=-1)
    if config.scale_by_temperature_squared:
        soft_BxL *= config.teacher_temperature**2
    return soft_BxL


def _bucketed(log_x_BxLxV: jax.Array, ids_BxLxk: jax.Array) -> jax.Array:
    """A distribution on k + 1 outcomes: k ids, then all others as one."""
    top_BxLxk = jnp.take_along_axis(log_x_BxLxV, ids_BxLxk, axis=-1)
    # Summed over the others: 1 - Σ of the k has no digits left where the k have nearly all.
    others_BxLxV = jnp.put_along_axis(log_x_BxLxV, ids_BxLxk, LOG_ZERO, axis=-1, inplace=False)
    rest_BxLx1 = jax.nn.logsumexp(others_BxLxV, axis=-1, keepdims=True)
    return jnp.concatenate([top_BxLxk, rest_BxLx1], axis=-1)


def kept_labels(labels: SoftLabels, config: LossConfig, dtype: jnp.dtype) -> SoftLabels:
    """The labels that a loss is made from: the first teacher_top_k, the others with the rest.

    Raises:
        InputError: more are asked for than there are.
    """
    stored = labels.ids.shape[-1]
    k = config.teacher_top_k or stored
    if k > stored:
        raise InputError(
            f"LossConfig.teacher_top_k is {k} and the soft labels have {stored} ids a token: lower "
            "it, or set it to 0 for all of them."
        )
    log_q, rest = labels.log_q.astype(dtype), labels.rest.astype(dtype)
    if k < stored:
        rest = jnp.logaddexp(rest, jax.nn.logsumexp(log_q[..., k:], axis=-1))
    hard = labels.teacher_hard if labels.teacher_hard is None else labels.teacher_hard.astype(dtype)
    return SoftLabels(labels.ids[..., :k], log_q[..., :k], rest, hard)


def _as_float(logits_BxLxV: jax.Array) -> jax.Array:
    return logits_BxLxV.astype(jnp.promote_types(logits_BxLxV.dtype, jnp.float32))


def _mask(logits_BxLxV: jax.Array, vocab_size: int) -> jax.Array:
    if logits_BxLxV.shape[-1] == vocab_size:
        return logits_BxLxV
    real_V = jnp.arange(logits_BxLxV.shape[-1]) < vocab_size
    return jnp.where(real_V[None, None], logits_BxLxV, LOG_ZERO)


def _fit(logits_BxLxV: jax.Array, size: int, vocab_size: int) -> jax.Array:
    """Another model's padding made this one's: cut or filled up to `size` ids, and masked."""
    missing = max(0, size - logits_BxLxV.shape[-1])
    return _mask(jnp.pad(logits_BxLxV, ((0, 0), (0, 0), (0, missing)))[..., :size], vocab_size)


def _log_softmax(logits_BxLxV: jax.Array, vocab_size: int) -> jax.Array:
    # Masked after the temperature too, which may have moved the padding's "log 0" out of range.
    masked_BxLxV = _mask(logits_BxLxV, vocab_size)
    return _mask(jax.nn.log_softmax(masked_BxLxV, axis=-1), vocab_size)


def _at(values_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]


def check_vocab_size(
    config: LossConfig,
    vocab_size: int,
    student_ids: int,
    teacher_vocab_size: int,
    teacher_ids: int | None,
) -> None:
    """Refuses what can't be over these ids.

    Args:
        config: the loss.
        vocab_size: number of ids that mean something.
        student_ids: V of the student's logits.
        teacher_vocab_size: how many of the ids the teacher has.
        teacher_ids: V of the teacher's logits; None where there is no teacher.

    Raises:
        InputError: logits over too few ids, more top ids than there are, a teacher with more ids
            than the student, or a divergence that is infinite where the teacher has fewer.
    """
    for ids, size in ((student_ids, vocab_size), (teacher_ids, teacher_vocab_size)):
        if ids is not None and ids < size:
            raise InputError(f"Logits over {ids} ids are too few for a vocabulary of {size}.")
    if teacher_vocab_size > vocab_size:
        raise InputError(
            f"The teacher has {teacher_vocab_size} ids and the student {vocab_size}: prepare the "
            "cache with a vocabulary of at least as many reserved ids as the teacher's."
        )
    if config.teacher_top_k > teacher_vocab_size:
        raise InputError(
            f"LossConfig.teacher_top_k is {config.teacher_top_k}, more than the vocabulary's "
            f"{teacher_vocab_size} ids; set it to at most that, or to 0 for all ids."
        )
    if teacher_vocab_size < vocab_size and needs_every_id(config.divergence):
        raise InputError(
            f"LossConfig.divergence is {config.divergence}, which is infinite for the "
            f"{vocab_size - teacher_vocab_size} ids that the teacher lacks: set it to "
            "@divergences.ForwardKL() or @divergences.JensenShannon(), or take a teacher with all "
            "of the vocabulary's ids."
        )
