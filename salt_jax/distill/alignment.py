"""LET, late-to-early training (arXiv 2602.05393): aligns hidden states of student and teacher.

    loss = hard - λ · cos(P h, t)

h is the student's hidden state after block k, an early one, t the teacher's after its final norm,
both at the same position, and P a projection where their widths differ. λ falls linearly to 0. The
teacher gives no distribution over tokens, so its vocabulary may have another size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from salt_jax.errors import InputError, require_counts

# Added to squared norms; those of hidden states are about their width.
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which hidden state is aligned, and λ by step.

    Attributes:
      stop: S_stop, the first step where λ is 0; the teacher runs until then.
      layer: k, from 1: the number of the student's blocks before h.
      weight: λ at step 0; 0.1 is the paper's.
      projection: Whether P is trained; None trains it where the widths differ, and only there is it
        allowed. P is in the train state of stage 1 and nowhere else.
    """

    stop: int
    layer: int = 3
    weight: float = 0.1
    projection: bool | None = None

    def __post_init__(self) -> None:
        require_counts(**{"Alignment.stop": self.stop, "Alignment.layer": self.layer})
        if not 0.0 < self.weight < math.inf:
            raise InputError(f"Alignment.weight is {self.weight}; set it to a number above 0.")

    def weight_at(self, step: int) -> float:
        """λ for the update that follows `step` completed steps."""
        return self.weight * max(0.0, 1.0 - step / self.stop)

    def is_projected(self, layers: int, width: int, teacher_width: int) -> bool:
        """Whether there is a P between a student of some layers and width and a teacher.

        Raises:
          InputError: k is out of the student's range, or `projection` doesn't suit the widths.
        """
        if self.layer > layers:
            raise InputError(
                f"Alignment.layer is {self.layer} and the student has {layers} layers: set it to 1 "
                f"to {layers}."
            )
        differ = width != teacher_width
        if self.projection not in (None, differ):
            raise InputError(
                f"Alignment.projection is {self.projection}, the student's width {width} and the "
                f"teacher's {teacher_width}: leave it unset, which projects where they differ."
            )
        return differ


def cosine_sum(
    student_BxLxD: jax.Array,
    teacher_BxLxE: jax.Array,
    weights_BxL: jax.Array,
    kernel_DxE: jax.Array | None = None,
) -> jax.Array:
    """Σ weight · cos(P h, t) over a batch, a scalar in float32 (float64 for float64 states).

    The teacher gets no gradient. States at positions of weight 0 are masked out.

    Args:
      student_BxLxD: h; its dtype is that of the product with P.
      teacher_BxLxE: t; E is D without a kernel.
      weights_BxL: 0 or more.
      kernel_DxE: P; None for none.
    """
    precise = jnp.promote_types(student_BxLxD.dtype, jnp.float32)
    counts_BxLx1 = (weights_BxL > 0)[..., None]

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(precise)
        return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)

    h_BxLxE = jnp.where(counts_BxLx1, student_BxLxD, 0)
    if kernel_DxE is not None:
        kernel_DxE = kernel_DxE.astype(h_BxLxE.dtype)
        h_BxLxE = jnp.matmul(h_BxLxE, kernel_DxE, preferred_element_type=precise)
    t_BxLxE = lax.stop_gradient(jnp.where(counts_BxLx1, teacher_BxLxE, 0))
    return jnp.sum(weights_BxL[..., None] * unit(h_BxLxE) * unit(t_BxLxE))
