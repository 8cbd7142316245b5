"""Schedules of ω against their definitions."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_jax.distill import schedules
from salt_jax.errors import InputError

OMEGAS = st.floats(0.0, 1.0)
STEPS = st.integers(0, 300)


def omegas(schedule: schedules.Schedule, steps: int) -> np.ndarray:
    return np.array([schedule.omega_at(step) for step in range(steps)])


def test_no_distillation() -> None:
    schedule = schedules.NoDistillation()
    assert schedule.distill_steps(100) == 0
    assert not omegas(schedule, 100).any()


@given(omega=OMEGAS)
def test_constant(omega: float) -> None:
    schedule = schedules.Constant(omega)
    assert schedule.distill_steps(50) == (50 if omega > 0 else 0)
    assert (omegas(schedule, 50) == omega).all()


@given(omega=OMEGAS, n_kd=STEPS)
def test_step(omega: float, n_kd: int) -> None:
    got = omegas(schedules.Step(omega, n_kd), 310)
    np.testing.assert_array_equal(got, np.where(np.arange(310) < n_kd, omega, 0.0))


@given(omega=OMEGAS, start=STEPS, extra=STEPS)
def test_linear_decay(omega: float, start: int, extra: int) -> None:
    n_kd = start + extra
    got = omegas(schedules.LinearDecay(omega, n_kd, start), 610)
    want = np.interp(np.arange(610), [start, n_kd], [omega, 0.0])
    if not extra:
        want = np.where(np.arange(610) < n_kd, omega, 0.0)
    np.testing.assert_allclose(got, want, atol=1e-12)


@given(omega=st.floats(0.0, 0.999), n_kd=st.integers(1, 300))
def test_linear_ratio_decay(omega: float, n_kd: int) -> None:
    got = omegas(schedules.LinearRatioDecay(omega, n_kd), 310)
    ratios = got / (1.0 - got)
    want = np.interp(np.arange(310), [0, n_kd], [omega / (1.0 - omega), 0.0])
    np.testing.assert_allclose(ratios, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("signal", schedules.SIGNALS)
def test_adaptive_ends_by_a_running_mean(signal: str) -> None:
    """The rule written as loops over the whole history; the state after each step is JSON."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = np.linspace(1, -1, 60) + rng.normal(size=60)
        values[7] = np.nan
        window, patience, least = (int(x) for x in rng.integers(1, [12, 6, 40]))
        schedule = schedules.Adaptive(
            0.5, 50, least, signal, margin=0.2, window=window, patience=patience
        )
        mean, below, expected = 0.0, [], None
        for done, value in enumerate(values, start=1):
            if np.isnan(value):
                continue
            rate = 1 / done if done < window else 1 / window
            mean = (1 - rate) * mean + rate * value
            below.append(mean < 0.2)
            if len(below) >= patience and all(below[-patience:]) and done + 1 >= least:
                expected = done + 1
                break
        seen = schedules.Watched()
        for done, value in enumerate(values, start=1):
            hard = {"hard": value + 3.0, "teacher_hard": 3.0, "gradient_cosine": 9.0}
            cosine = {"hard": 9.0, "teacher_hard": 0.0, "gradient_cosine": value}
            before = json.loads(json.dumps(seen._asdict()))
            metrics = hard if signal == "gap" else cosine
            seen = schedule.after(schedules.Watched(**before), done, metrics)
        assert seen.n_kd == expected


def test_adaptive_is_bounded() -> None:
    schedule = schedules.Adaptive(0.5, most=30)
    np.testing.assert_array_equal(omegas(schedule, 40), [0.5] * 30 + [0.0] * 10)
    assert [schedule.distill_steps(total) for total in (20, 40)] == [20, 30]
    for settings, words in (
        ({}, "most is None, and the rule may never end stage 1"),
        ({"most": 3, "least": 4}, "least is 4, more than most, 3"),
        ({"most": 3, "signal": "loss"}, "signal is 'loss'; set it to one of gap, cosine"),
        ({"most": 3, "patience": 0}, "patience is 0"),
        ({"most": -3}, "most is -3"),
    ):
        with pytest.raises(InputError, match=words):
            schedules.Adaptive(0.5, **settings)  # type: ignore[arg-type]


SCHEDULES = st.one_of(
    st.just(schedules.NoDistillation()),
    st.builds(schedules.Constant, OMEGAS),
    st.builds(schedules.Step, OMEGAS, STEPS),
    st.builds(lambda w, a, b: schedules.LinearDecay(w, a + b, a), OMEGAS, STEPS, STEPS),
    st.builds(schedules.LinearRatioDecay, st.floats(0.0, 0.999), STEPS),
)


@given(schedule=SCHEDULES, total=STEPS)
def test_distill_steps_is_where_the_teacher_is_done(
    schedule: schedules.Schedule, total: int
) -> None:
    got, boundary = omegas(schedule, total), schedule.distill_steps(total)
    assert 0 <= boundary <= total
    assert not got[boundary:].any()
    assert (got >= 0).all()
    assert (got <= 1).all()
    if total:
        assert boundary == 0 or got[:boundary].any()


@given(omega=st.floats(0.001, 0.999), n_kd=st.integers(1, 300))
def test_stage_1_is_no_longer_than_it_must_be(omega: float, n_kd: int) -> None:
    for schedule in (
        schedules.Step(omega, n_kd),
        schedules.LinearDecay(omega, n_kd, n_kd // 2),
        schedules.LinearRatioDecay(omega, n_kd),
    ):
        assert schedule.distill_steps(1000) == n_kd
        assert schedule.distill_steps(n_kd - 1) == n_kd - 1
        assert schedule.omega_at(n_kd - 1) > 0


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (schedules.Constant, {"omega": 1.1}, r"Constant.omega is 1.1; set it within \[0, 1\]"),
        (schedules.Step, {"omega": -0.1, "n_kd": 1}, "Step.omega is -0.1"),
        (schedules.Step, {"omega": float("nan"), "n_kd": 1}, "Step.omega is nan"),
        (schedules.Step, {"omega": 0.5, "n_kd": -1}, "Step.n_kd is -1"),
        (schedules.Step, {"omega": 0.5, "n_kd": 1.5}, "Step.n_kd is 1.5"),
        (schedules.LinearDecay, {"omega": 0.5, "start": 5, "n_kd": 4}, "start is 5, after n_kd 4"),
        (schedules.LinearDecay, {"omega": 0.5, "start": -5, "n_kd": 4}, "start is -5"),
        (schedules.LinearRatioDecay, {"omega": 1.0, "n_kd": 4}, "set omega below 1"),
        (schedules.LinearRatioDecay, {"omega": 2.0, "n_kd": 4}, "omega is 2.0"),
    ],
)
def test_bad_settings_are_named(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kind(**settings)
