"""Gates: the share of ω that each token gets, by the losses of student and teacher on it.

A gate reads the numbers that a chunk of tokens has anyway (`token_losses.py`), and no gradient goes
through it. It is a hypothesis of this project and not part of SALT (docs/method.md).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from salt_jax.errors import InputError


class TaughtTokens(NamedTuple):
    """What a gate may read of C tokens with the targets y.

    Attributes:
      hard: The student's -log p[y], nats, [C].
      teacher_hard: The teacher's -log q[y] at temperature 1, nats, [C].
      truth_in_top: Whether y is among the teacher's k most likely ids, bool [C], from k.
    """

    hard: jax.Array
    teacher_hard: jax.Array
    truth_in_top: Callable[[int], jax.Array]


class Gate(Protocol):
    """The share of ω by token: a function, or a dataclass of settings. It is jitted."""

    def __call__(self, tokens: TaughtTokens) -> jax.Array:
        """The shares, bool or within [0, 1], [C]."""
        ...


@dataclasses.dataclass(frozen=True)
class TeacherAhead:
    """1 where the teacher's loss is below the student's, else 0."""

    def __call__(self, tokens: TaughtTokens) -> jax.Array:
        return tokens.teacher_hard < tokens.hard


@dataclasses.dataclass(frozen=True)
class TruthInTop:
    """1 where fewer than k ids are more likely than the truth to the teacher, else 0."""

    k: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InputError(f"TruthInTop.k is {self.k!r}; set it to a whole number of at least 1.")

    def __call__(self, tokens: TaughtTokens) -> jax.Array:
        return tokens.truth_in_top(self.k)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """q(y)^γ, with the teacher's probability of the truth at temperature 1."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma < math.inf:
            raise InputError(f"Confidence.gamma is {self.gamma}; set it to a number above 0.")

    def __call__(self, tokens: TaughtTokens) -> jax.Array:
        return jnp.exp(-self.gamma * tokens.teacher_hard)


def truth_in_labels(ids_CxK: jax.Array, targets_C: jax.Array, k: int) -> jax.Array:
    """`TaughtTokens.truth_in_top` of soft labels with K ids a token, best first.

    Raises:
      InputError: k is above K.
    """
    if k > ids_CxK.shape[-1]:
        raise InputError(
            f"LossConfig.gate asks for the teacher's {k} most likely ids and the soft labels give "
            f"the loss {ids_CxK.shape[-1]} a token: lower the gate's k, raise "
            "LossConfig.teacher_top_k, or make labels with more ids."
        )
    return jnp.any(ids_CxK[:, :k] == targets_C[:, None], axis=-1)


def require_gate_of_labels(gate: Gate | None, k: int) -> None:
    """Raises InputError for a gate that needs more than soft labels of k ids a token have."""
    if gate is not None:
        ids, loss = jnp.zeros((1, k), jnp.int32), jnp.zeros(1)
        in_top = lambda top: truth_in_labels(ids, ids[:, 0], top)  # noqa: E731
        jax.eval_shape(lambda: gate(TaughtTokens(loss, loss, in_top)))
