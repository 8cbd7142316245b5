"""The projection of LET (`distill/alignment.py`) from the student's width to the teacher's.

It is trained beside the student, by Adam at the student's learning rate, and is part of the train
state while there is a teacher. It is no parameter of the student: stage 2, evaluation, exports and
models in checkpoints don't have it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ProjectionState(NamedTuple):
    """P between two steps: its kernel, float32 [D, E], and Adam's moments."""

    kernel: jax.Array
    moments: Any


@dataclasses.dataclass(frozen=True)
class ProjectionTrainer:
    """How a projection between two widths is made and trained."""

    width: int
    teacher_width: int
    learning_rate: optax.Schedule

    def create(self, seed: int) -> ProjectionState:
        """A projection at step 0, which keeps the size of a vector's elements."""
        key = jax.random.fold_in(jax.random.key(seed), self.width)
        kernel_DxE = jax.random.normal(key, (self.width, self.teacher_width), jnp.float32)
        kernel_DxE /= self.width**0.5
        return ProjectionState(kernel_DxE, self._optimizer.init(kernel_DxE))

    def update(self, projection: ProjectionState, gradient_DxE: jax.Array) -> ProjectionState:
        """The projection after a step."""
        kernel_DxE, moments = projection
        updates, moments = self._optimizer.update(gradient_DxE, moments, kernel_DxE)
        return ProjectionState(optax.apply_updates(kernel_DxE, updates), moments)

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, b1=0.9, b2=0.95)
