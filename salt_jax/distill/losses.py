"""The settings and formulas of the loss, and the teacher's soft labels.

    p = softmax(z_s / T)             student, T = student_temperature, 1 by default
    q = softmax(z_t / τ)             teacher, τ = teacher_temperature
    hard = -log softmax(z_s)[y]
    soft = a divergence of p from q  by default -Σ q log p, KL(q ‖ p) plus a constant
    loss = (1 - ω) · hard + ω · soft + z_loss · log² Σ exp z_s

where a gate (`gates.py`) may give each token a share of ω.

`token_losses.py` computes it.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from salt_jax.distill.divergences import Divergence, ForwardKL, needs_every_id
from salt_jax.distill.gates import Gate
from salt_jax.errors import InputError

# Metrics that exist only with a teacher.
TEACHER_VALUES = ("soft", "teacher_hard", "agreement", "gate", "cosine", "gradient_cosine")


class SoftLabels(NamedTuple):
    """A teacher's distributions over K + 1 outcomes per token, instead of its logits.

    Attributes:
      ids: int32 [..., K], the most likely ids, best first.
      log_q: [..., K], log of their probabilities over the whole vocabulary at temperature τ.
      rest: [...], log of the probability of all other ids together.
      teacher_hard: [...], the teacher's -log q[y] at temperature 1, nats; set in stored labels.
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
      student_temperature: T, on the student's logits in soft; hard always has temperature 1.
      scale_by_temperature_squared: Multiply soft by τ², the convention of systems with one
        temperature on both sides.
      divergence: The soft term: ForwardKL, ReverseKL or JensenShannon of `divergences.py`, or your
        own.
      teacher_top_k: k > 0 reduces p and q to k + 1 outcomes: the teacher's k most likely ids (of
        equal ones the lower id first), and all others as one. Nothing is renormalised: with
        ForwardKL, for example, soft = -Σ_{top k} q log p - q_rest · log(1 - Σ_{top k} p). 0 uses
        the whole vocabulary, or all ids of stored soft labels.
      gate: Each token's share of ω: TeacherAhead, TruthInTop or Confidence of `gates.py`, or your
        own; None for 1.
      gradient_cosine: Also give the cosine of the gradients of soft and hard in the logits, p - q
        and p - onehot(y), as a metric; needs a teacher's logits.
      z_loss: λ of λ · log² Σ exp z_s, which keeps logits from drifting (T5X uses 1e-4).
      chunk_tokens: Tokens whose logits a device holds at once (`chunked_loss.py`), in 4 ·
        chunk_tokens · V bytes for each model. Several hundred are efficient on a GPU or TPU, 128 on
        a CPU.
    """

    teacher_temperature: float = 0.25
    student_temperature: float = 1.0
    scale_by_temperature_squared: bool = False
    divergence: Divergence = ForwardKL()  # noqa: RUF009 (frozen)
    teacher_top_k: int = 0
    gate: Gate | None = None
    gradient_cosine: bool = False
    z_loss: float = 0.0
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        positive, count = "a number above 0", "a whole number"
        is_made = lambda part: callable(part) and not isinstance(part, type)  # noqa: E731
        whole = isinstance(self.teacher_top_k, int), isinstance(self.chunk_tokens, int)
        for name, valid, expected in (
            ("teacher_temperature", 0.0 < self.teacher_temperature < math.inf, positive),
            ("student_temperature", 0.0 < self.student_temperature < math.inf, positive),
            (
                *("divergence", is_made(self.divergence)),
                "a divergence, such as @divergences.ForwardKL() in a gin file",
            ),
            (
                *("gate", self.gate is None or is_made(self.gate)),
                "a gate, such as @gates.TeacherAhead() in a gin file, or None",
            ),
            ("teacher_top_k", whole[0] and self.teacher_top_k >= 0, f"{count}, 0 for all ids"),
            ("z_loss", 0.0 <= self.z_loss < math.inf, "0 or more"),
            ("chunk_tokens", whole[1] and self.chunk_tokens >= 1, f"{count} of at least 1"),
        ):
            if not valid:
                raise InputError(
                    f"LossConfig.{name} is {getattr(self, name)!r}; set it to {expected}."
                )


def kept_labels(labels: SoftLabels, config: LossConfig, dtype: jnp.dtype) -> SoftLabels:
    """The first teacher_top_k labels, with the others added to the rest.

    Raises:
      InputError: The labels have fewer ids than teacher_top_k.
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


def check_vocab_size(
    config: LossConfig,
    vocab_size: int,
    student_ids: int,
    teacher_vocab_size: int,
    teacher_ids: int | None,
) -> None:
    """Checks that the loss can be computed over these vocabularies.

    Args:
      config: The loss.
      vocab_size: Number of ids in use.
      student_ids: V of the student's logits.
      teacher_vocab_size: Number of ids in use that the teacher has.
      teacher_ids: V of the teacher's logits; None without a teacher.

    Raises:
      InputError: Logits over too few ids, more top ids than there are, a teacher with more ids than
        the student, or with fewer and a divergence that is infinite there.
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
