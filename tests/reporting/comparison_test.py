"""Runs at equal steps, FLOPs and time, from numbers made by hand."""

import math
import pathlib

import pandas as pd
import pytest

from salt_jax.reporting.comparison import (
    FLOPS,
    SECONDS,
    STEPS,
    comparable_groups,
    cost_at_step,
    largest_common,
    matched,
    read_at,
)
from salt_jax.reporting.runs import EVALUATION, TRAINING, Origin, TrainRun


def frame(rows, names, columns):
    return pd.DataFrame(rows, columns=names, dtype=float).reindex(columns=[*columns])


def evaluations(*points):
    """Evaluations from (step, log-perplexity, accuracy, FLOPs, seconds)."""
    names = ["step", "log_perplexity", "next_token_accuracy", "train_flops", "seconds"]
    return frame(points, names, EVALUATION)


def run(label, points=None, training=(), **facts):
    """A run; its lines of training metrics are (step, FLOPs, seconds, scoring's FLOPs)."""
    names = ["step", "train_flops", "seconds", "scoring_flops"]
    lines = frame(training, names, TRAINING).assign(teacher_training_flops=0.0)
    origin = Origin(pathlib.Path(label), "train", "", {}, None, "", "")
    points = evaluations() if points is None else points
    return TrainRun(origin, label, facts, points, lines, None, pd.DataFrame(), None, {}, 0)


BASELINE = run("baseline", evaluations((100, 4.0, 0.30, 10.0, 50.0), (200, 3.6, 0.34, 20.0, 100.0)))
# Stage 1 costs half as much again: 100 steps for 15 FLOPs, then 10 for 100 as above.
SALT = run("salt", evaluations((100, 3.8, 0.32, 15.0, 70.0), (200, 3.4, 0.36, 25.0, 120.0)))


def test_at_equal_steps_nothing_is_interpolated():
    found = matched([BASELINE, SALT], STEPS)
    assert found.value == 200
    assert found.readings.index.tolist() == ["baseline", "salt"]
    assert found.readings["log_perplexity"].tolist() == [3.6, 3.4]
    assert not found.readings["interpolated"].any()


def test_at_equal_flops_the_more_expensive_run_is_read_between_its_evaluations():
    found = matched([BASELINE, SALT], FLOPS)
    assert found.value == 20.0
    baseline, salt = (found.readings.loc[label] for label in ("baseline", "salt"))
    names = ["log_perplexity", "step", "interpolated"]
    assert baseline[names].tolist() == [3.6, 200, False]
    assert salt["log_perplexity"] == pytest.approx(3.6)  # half-way from 3.8 to 3.4
    assert salt["next_token_accuracy"] == pytest.approx(0.34)
    assert salt["step"] == pytest.approx(150)
    assert salt["interpolated"]


def test_at_equal_time():
    found = matched([BASELINE, SALT], SECONDS)
    assert found.value == 100.0
    salt = found.readings.loc["salt"]
    assert salt["step"] == pytest.approx(160)  # 30 of the 50 seconds from step 100 to 200
    assert salt["log_perplexity"] == pytest.approx(3.8 - 0.6 * 0.4)


def test_a_run_whose_first_evaluation_comes_later_has_no_reading():
    late = run("late", evaluations((300, 3.0, 0.4, 30.0, 150.0)))
    found = matched([BASELINE, late], STEPS)
    assert found.value == 200
    assert found.readings.loc["late"].isna().all()


def test_nothing_is_read_beyond_the_ends():
    points = BASELINE.evaluations
    assert read_at(points, STEPS, 99) is None
    assert read_at(points, STEPS, 201) is None
    assert read_at(evaluations(), STEPS, 1) is None
    assert read_at(points, STEPS, 100)["log_perplexity"] == 4.0


def test_seconds_that_fall_after_a_resume_do_not_break_the_reading():
    points = evaluations((1, 5.0, 0.1, 1, 10.0), (2, 4.0, 0.2, 2, 9.0), (3, 3.0, 0.3, 3, 20.0))
    assert read_at(points, SECONDS, 15.0)["log_perplexity"] == pytest.approx(3.5)


def test_no_common_value_without_evaluations():
    assert largest_common([BASELINE, run("new")], STEPS) is None
    assert matched([], FLOPS) is None


def test_cost_at_step_uses_training_lines_too():
    salt = run("salt", SALT.evaluations, [(40, 6.0, 20.0, math.nan)])
    assert cost_at_step(salt, FLOPS, 20) == pytest.approx(3.0)  # from nothing at step 0
    assert cost_at_step(salt, FLOPS, 70) == pytest.approx(10.5)
    assert cost_at_step(salt, STEPS, 70) == pytest.approx(70)


def test_cost_at_step_begins_with_what_was_spent_before_the_run():
    salt_ds = run("salt_ds", training=[(40, 16.0, 20.0, 10.0)])
    assert cost_at_step(salt_ds, FLOPS, 0) == pytest.approx(10.0)
    assert cost_at_step(salt_ds, FLOPS, 20) == pytest.approx(13.0)
    assert cost_at_step(salt_ds, STEPS, 20) == pytest.approx(20)


def test_groups_hold_models_of_one_size_on_one_cache():
    small = run("slm", parameters=1)
    arms = [run("a", parameters=5), run("b", parameters=5)]
    elsewhere = run("c", parameters=5, cache_digest="other")
    groups = comparable_groups([small, arms[0], elsewhere, arms[1]])
    assert [[one.label for one in group] for group in groups] == [["a", "b"], ["slm"], ["c"]]
