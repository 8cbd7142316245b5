"""LET's term against float64 NumPy, and λ by step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.distill.alignment import Alignment, cosine_sum
from salt_jax.errors import InputError

RNG = np.random.default_rng(0)
STUDENT, TEACHER, KERNEL = (RNG.normal(size=shape) for shape in ((2, 5, 6), (2, 5, 4), (6, 4)))
WEIGHTS = np.array([[1.0, 0.5, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 0.25, 0.0]])


def oracle(student: np.ndarray, teacher: np.ndarray, kernel: np.ndarray | None) -> float:
    total = 0.0
    for at in np.ndindex(WEIGHTS.shape):
        h, t = student[at] if kernel is None else kernel.T @ student[at], teacher[at]
        total += WEIGHTS[at] * (h @ t) / (np.linalg.norm(h) * np.linalg.norm(t))
    return total


@pytest.mark.parametrize("kernel", [None, KERNEL], ids=("one width", "projected"))
def test_equals_float64_numpy(kernel: np.ndarray | None) -> None:
    student = STUDENT if kernel is not None else STUDENT[..., :4]
    trained: list[Any] = [student] if kernel is None else [student, kernel]

    def of(student: Any, kernel: Any = None) -> Any:
        return cosine_sum(student, jnp.asarray(TEACHER), jnp.asarray(WEIGHTS), kernel)

    with jax.enable_x64(True):
        arguments = [jnp.asarray(x) for x in trained]
        value, gradients = jax.value_and_grad(of, argnums=range(len(trained)))(*arguments)
    assert value == pytest.approx(oracle(student, TEACHER, kernel), rel=1e-11)
    for which, gradient in enumerate(gradients):
        for at in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in trained]
                moved[which][at] += step
                sides.append(oracle(moved[0], TEACHER, moved[1] if kernel is not None else None))
            rise = (sides[0] - sides[1]) / 2e-6
            np.testing.assert_allclose(gradient[at], rise, rtol=1e-7, atol=1e-8)


def test_what_is_masked_out_may_be_anything_and_the_teacher_gets_no_gradient() -> None:
    masked = (WEIGHTS == 0)[..., None]
    states = [jnp.asarray(np.where(masked, np.nan, x), jnp.float32) for x in (STUDENT, TEACHER)]
    of = lambda h, t: cosine_sum(h, t, jnp.asarray(WEIGHTS), jnp.asarray(KERNEL))  # noqa: E731
    value, (student, teacher) = jax.value_and_grad(of, argnums=(0, 1))(*states)
    assert value == pytest.approx(oracle(STUDENT, TEACHER, KERNEL), rel=1e-5)
    assert np.isfinite(student).all()
    assert (student[WEIGHTS == 0] == 0).all()
    assert (teacher == 0).all()


def test_states_of_bfloat16_are_normalized_in_float32() -> None:
    states = [jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER)]
    rounded = [np.asarray(x, np.float64) for x in states]
    value = cosine_sum(states[0][..., :4], states[1], jnp.asarray(WEIGHTS, jnp.float32))
    assert value.dtype == jnp.float32
    assert value == pytest.approx(oracle(rounded[0][..., :4], rounded[1], None), rel=1e-5)


def test_the_weight_falls_linearly_to_0() -> None:
    got = [Alignment(stop=4, weight=0.2).weight_at(step) for step in range(6)]
    np.testing.assert_allclose(got, [0.2, 0.15, 0.1, 0.05, 0.0, 0.0])


def test_a_projection_is_where_widths_differ() -> None:
    assert Alignment(stop=4, layer=2).is_projected(2, 8, 16)
    assert Alignment(stop=4, layer=2, projection=True).is_projected(2, 8, 16)
    assert not Alignment(stop=4, layer=2, projection=False).is_projected(2, 8, 8)
    for projection, width in ((True, 8), (False, 16)):
        with pytest.raises(InputError, match=f"projection is {projection}, the student's width 8"):
            Alignment(stop=4, layer=2, projection=projection).is_projected(2, 8, width)
    with pytest.raises(InputError, match=r"layer is 3 and the student has 2 layers: set it to 1"):
        Alignment(stop=4).is_projected(2, 8, 8)
