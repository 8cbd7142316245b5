"""Learning rates at the steps that matter, and what weight decay leaves alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.training.optimizers import LearningRate, OptimizerConfig


def test_cosine() -> None:
    rate = LearningRate(1.0, warmup_steps=4, final=0.1).schedule(104)
    assert [float(rate(i)) for i in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert float(rate(54)) == pytest.approx(0.55)
    assert float(rate(104)) == pytest.approx(0.1)


def test_inverse_square_root() -> None:
    rate = LearningRate(2.0, warmup_steps=100, decay="inverse_sqrt").schedule(1000)
    assert float(rate(49)) == pytest.approx(1.0)
    assert float(rate(400)) == pytest.approx(2.0 * (100 / 400) ** 0.5)


def test_constant_without_warm_up() -> None:
    rate = LearningRate(3.0, decay="constant").schedule(10)
    assert [float(rate(i)) for i in (0, 9)] == [3.0, 3.0]


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_weight_decay_is_for_matrices(kind: str) -> None:
    rate = LearningRate(0.5, decay="constant")
    config = OptimizerConfig(rate, kind=kind, weight_decay=0.2, clip_norm=0)  # type: ignore[arg-type]
    params = {"kernel": jnp.full((3, 3), 2.0), "norm": {"scale": jnp.full(3, 2.0)}}
    optimizer = config.make(10)
    zero = {"kernel": jnp.zeros((3, 3)), "norm": {"scale": jnp.zeros(3)}}
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.2 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0.0)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_updates_go_downhill(kind: str) -> None:
    config = OptimizerConfig(LearningRate(0.1, decay="constant"), kind=kind)  # type: ignore[arg-type]
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = config.make(10)
    updates, _ = optimizer.update({"kernel": jnp.ones((2, 2))}, optimizer.init(params), params)
    assert (updates["kernel"] < 0).all()


def test_clipping() -> None:
    rate = LearningRate(1.0, decay="constant")
    config = OptimizerConfig(rate, epsilon=1.0, beta1=0.0, beta2=0.0, clip_norm=1.0)
    params = {"kernel": jnp.zeros((2, 2))}
    optimizer = config.make(10)
    updates, _ = optimizer.update(
        {"kernel": jnp.full((2, 2), 100.0)}, optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.5 / (0.5 + 1.0), rtol=1e-5)
