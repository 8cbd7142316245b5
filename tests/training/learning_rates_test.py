"""Learning rates at the steps that matter."""

import numpy as np
import pytest

from salt_jax.training.learning_rates import (
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSqrt,
    WarmupStableDecay,
)


def test_cosine() -> None:
    rate = WarmupCosine(1.0, warmup_steps=4, final=0.1).schedule(104)
    assert [float(rate(i)) for i in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert float(rate(54)) == pytest.approx(0.55)
    assert float(rate(104)) == pytest.approx(0.1)


def test_inverse_square_root() -> None:
    rate = WarmupInverseSqrt(2.0, warmup_steps=100).schedule(1000)
    assert float(rate(49)) == pytest.approx(1.0)
    assert float(rate(400)) == pytest.approx(2.0 * (100 / 400) ** 0.5)


def test_constant_without_warm_up() -> None:
    rate = WarmupConstant(3.0).schedule(10)
    assert [float(rate(i)) for i in (0, 9)] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("power", "shape"), [(1.0, lambda x: 1 - x), (0.5, lambda x: 1 - np.sqrt(x))]
)
def test_warm_up_stable_decay(power: float, shape: object) -> None:
    rate = WarmupStableDecay(2.0, 10, final=0.5, decay_fraction=0.2, power=power).schedule(100)
    assert float(rate(4)) == pytest.approx(1.0)
    np.testing.assert_array_equal(rate(np.arange(10, 81)), 2.0)
    x = np.arange(21) / 20
    expected = 0.5 + 1.5 * shape(x)  # type: ignore[operator]
    np.testing.assert_allclose(rate(np.arange(80, 101)), expected, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_decay_of_no_steps_and_of_all(fraction: float) -> None:
    rate = WarmupStableDecay(2.0, 10, decay_fraction=fraction, power=1.0).schedule(20)
    assert float(rate(9)) == pytest.approx(2.0)  # the decay leaves the warm-up alone
    assert float(rate(15)) == pytest.approx(1.0 if fraction else 2.0)
