"""What a divergence may be, and what it may say of itself."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.distill.chunked_loss import loss_sums
from salt_jax.distill.divergences import (
    LOG_ZERO,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    needs_every_id,
)
from salt_jax.distill.losses import LossConfig
from salt_jax.errors import InputError

EACH = pytest.mark.parametrize(
    "divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3)], ids=str
)


def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """ForwardKL as a function, which knows nothing of its derivative."""
    return -jnp.exp(log_q) * log_p


def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """ReverseKL with its whole derivative."""
    return jnp.exp(log_p) * (log_p - log_q)


def jensen_shannon(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """JensenShannon(0.3) with its whole derivative."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.logaddexp(math.log(0.3) + log_q, math.log(0.7) + log_p)
    return 0.3 * q * (log_q - log_m) + 0.7 * p * (log_p - log_m)


def gradients(divergence: Divergence, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss of some tokens, and its gradients by the student's hidden states and head."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    targets, weights = jnp.asarray(rng.integers(11, size=(2, 5))), jnp.ones((2, 5))
    hidden, head, teacher, teacher_head = (
        normal(2, 5, 8),
        normal(16, 8),
        normal(2, 5, 4),
        normal(11, 4),
    )
    config = LossConfig(1.0, divergence=divergence, teacher_top_k=top_k, chunk_tokens=4)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return loss_sums(
            hidden,
            head,
            targets,
            weights,
            0.7,
            config,
            11,
            teacher_hidden_BxLxD=teacher,
            teacher_head_VxD=teacher_head,
        )[0]

    value, (d_hidden, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    return value, d_hidden, d_head


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize(
    ("shipped", "plain"),
    [(ForwardKL(), forward_kl), (ReverseKL(), reverse_kl), (JensenShannon(0.3), jensen_shannon)],
    ids=["forward_kl", "reverse_kl", "jensen_shannon"],
)
def test_what_a_divergence_knows_of_its_derivative_changes_nothing(
    shipped: Divergence, plain: Divergence, top_k: int
) -> None:
    with jax.enable_x64(True):
        for got, want in zip(gradients(shipped, top_k), gradients(plain, top_k), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


@EACH
def test_an_outcome_without_probability_has_no_part(divergence: Divergence) -> None:
    nothing = jnp.full((3,), LOG_ZERO)
    value, slope = jax.jvp(
        lambda log_p: divergence(log_p, nothing), (nothing,), (jnp.ones_like(nothing),)
    )
    assert not value.any()
    assert not slope.any()


def test_which_are_infinite_where_the_teacher_lacks_ids() -> None:
    def chi_squared(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return (jnp.exp(log_p) - jnp.exp(log_q)) ** 2 / jnp.exp(log_q)

    shipped = ForwardKL(), ReverseKL(), JensenShannon()
    assert [needs_every_id(one) for one in shipped] == [False, True, False]
    assert jax.jit(lambda: needs_every_id(chi_squared))()


@pytest.mark.parametrize("beta", [0.0, 1.0, -1, float("nan")])
def test_beta_is_between_0_and_1(beta: float) -> None:
    with pytest.raises(
        InputError, match=re.escape(f"JensenShannon.beta is {beta}; set it between")
    ):
        JensenShannon(beta)
