"""What runs cost by part: where it is charged, where it is only shown, where it is not known."""

import json

import numpy as np
import pytest

from salt_jax.reporting import page
from salt_jax.reporting.comparison import FLOPS, SECONDS, charged_for_teacher, matched
from salt_jax.reporting.runs import FLOPS_PARTS, SECONDS_PARTS, read_folder, read_folders
from salt_jax.reporting.sections import compose
from salt_jax.reporting.tables import NOTHING, cost_tables, format_power, format_seconds


def assert_parts_add_up(points):
    """Of one point, or of each."""
    for parts, whole in ((FLOPS_PARTS, "train_flops"), (SECONDS_PARTS, "seconds")):
        np.testing.assert_allclose(points[[*parts]].sum(axis=points.ndim - 1), points[whole])


def cells(table, row):
    return dict(zip(table.columns, next(one for one in table.rows if one[0] == row), strict=True))


@pytest.fixture
def arms(tmp_path, folders):
    return {run.label: run for run in read_folders(folders.experiment(tmp_path)).runs}


def test_the_parts_add_up_to_what_is_compared(arms):
    for arm in arms.values():
        for points in (arm.training, arm.evaluations):
            assert_parts_add_up(points)
    baseline, salt = arms["baseline"].costs, arms["salt"].costs
    assert baseline["teacher_flops"] == baseline["scoring_flops"] == 0
    assert salt["teacher_flops"] > salt["scoring_flops"] == 0
    assert arms["salt_ds"].costs["scoring_flops"] == 2e12


def test_flops_table(arms):
    table, _, _ = cost_tables([*arms.values()], charged=False)
    assert len(set(table.columns)) == len(table.columns)
    salt_ds = cells(table, "salt_ds")
    costs = arms["salt_ds"].costs
    assert salt_ds["student"] == format_power(costs["student_flops"])
    assert salt_ds["teacher"] == format_power(costs["teacher_flops"])
    assert salt_ds["scoring"] == "2.000 × 10¹²"
    assert salt_ds["train FLOPs, their sum"] == format_power(costs["train_flops"])
    assert salt_ds["evaluation, not charged"] == "1.500 × 10¹⁰"
    assert cells(table, "baseline")["teacher"] == "0"


def test_the_teacher_has_a_line_of_its_own(arms):
    table, times, _ = cost_tables([*arms.values()], charged=False)
    assert [row[0] for row in table.rows][-2:] == ["salt_ds", "teacher: slm at step 750"]
    teacher = cells(table, "teacher: slm at step 750")
    assert teacher["train FLOPs, their sum"] == format_power(arms["slm"].final["train_flops"])
    assert "the teacher of rkd, salt, salt_ds: not charged." in table.note
    seconds = cells(times, "teacher: slm at step 750")["time, their sum"]
    assert seconds == format_seconds(arms["slm"].final["seconds"])


def test_time_table(arms):
    _, table, _ = cost_tables([*arms.values()], charged=False)
    assert len(set(table.columns)) == len(table.columns)
    salt_ds = cells(table, "salt_ds")
    assert salt_ds["stage 1"] == "17.2 s"
    assert salt_ds["scoring"] == "2.0 s"
    assert salt_ds["time, their sum"] == format_seconds(arms["salt_ds"].final["seconds"])
    assert salt_ds["evaluation, not charged"] == "7.0 s"
    assert salt_ds["compiling, not charged"] == "11.0 s"


def test_tokens_table(arms):
    _, _, table = cost_tables([*arms.values()], charged=False)
    assert cells(table, "salt_ds") == {
        "arm": "salt_ds",
        "stage 1": f"{187 * 4096:,}",
        "stage 2": f"{563 * 4096:,}",
        "trained on, their sum": f"{750 * 4096:,}",
        "scored": "5,000,000",
    }
    assert cells(table, "teacher: slm at step 750")["scored"] == "0"


def test_scoring_is_charged_when_arms_are_matched(arms):
    """SALT_DS is read earlier than SALT: by then it had spent as much."""
    four = [arms[name] for name in ("baseline", "rkd", "salt", "salt_ds")]
    for axis in (FLOPS, SECONDS):
        step = matched(four, axis).readings["step"]
        assert step["salt_ds"] < step["salt"] < step["baseline"] == 750
    costs = matched(four, FLOPS).readings.loc["salt_ds"]
    total = arms["baseline"].final["train_flops"]
    assert costs[[*FLOPS_PARTS]].sum() == pytest.approx(total)
    assert costs["scoring_flops"] == 2e12


def test_teachers_are_charged_when_asked(arms):
    plain = [arms[name] for name in ("baseline", "salt")]
    baseline, salt = map(charged_for_teacher, plain)
    assert baseline is plain[0]
    made = arms["slm"].final
    for points in ("evaluations", "training", "final"):
        before, after = getattr(plain[1], points), getattr(salt, points)
        for cost in ("train_flops", "seconds"):
            assert np.array_equal(after[cost], before[cost] + made[cost])
        assert_parts_add_up(after)
        same = [*{*before.keys()} - {"train_flops", "seconds", FLOPS_PARTS[-1], SECONDS_PARTS[-1]}]
        assert after[same].equals(before[same])
    table, _, _ = cost_tables([baseline, salt], charged=True)
    assert cells(table, "salt")["training the teacher"] == format_power(made["train_flops"])
    assert cells(table, "baseline")["training the teacher"] == "0"
    assert "salt: charged." in table.note


def test_the_page_says_which_flops_are_equal(tmp_path, folders):
    material = read_folders(folders.experiment(tmp_path))
    text = page.render("Runs", compose(material), [], "now")
    assert (
        "Train FLOPs are the sum of the student's passes, the teacher's forward pass in stage 1, "
        "and the scoring that a run's selection needed. Evaluation is not in them."
    ) in text
    assert "Training the teacher is not charged" in text
    report = compose(material, charge_teacher_training=True)
    text = page.render("Runs", report, [], "now")
    assert "a run's selection needed, and the training of its teacher. Evaluation is" in text
    assert "Training the teacher is charged" in text
    (match,) = next(one.tables for one in report.sections if one.title == "Against train FLOPs")
    assert "student + teacher + scoring + training the teacher (%)" in match.columns


def test_the_numbers_hold_the_parts(tmp_path, folders):
    numbers = compose(read_folders(folders.experiment(tmp_path))).numbers
    json.dumps(numbers, allow_nan=False)
    salt_ds = numbers["runs"][4]
    assert salt_ds["costs"]["scoring_flops"] == 2e12
    assert salt_ds["teacher_training"]["train_flops"] == numbers["runs"][0]["train_flops"]
    assert numbers["runs"][1]["teacher_training"] is None
    arms = {arm["label"]: arm for arm in numbers["matched"][1]["arms"]}
    assert arms["salt_ds"]["costs"]["scoring_flops"] == 2e12


def test_a_run_of_another_version_has_no_parts(tmp_path, folders):
    lines = [folders.training(10), folders.evaluation(10)]
    path = folders.run(tmp_path / "old", lines, folders.summary_of("old", lines[-1]))
    run = read_folder(path)
    row = cost_tables([run], charged=False)[0].rows[0]
    assert row == ("old", NOTHING, NOTHING, NOTHING, "1.000 × 10¹⁰", NOTHING)
    assert charged_for_teacher(run) is run


def test_a_teacher_whose_cost_is_not_known_is_named_and_not_charged(tmp_path, folders):
    teacher = {"path": "pythia", "step": 0, "digest": "e" * 64, "training_cost": None}
    path = folders.arm(tmp_path / "salt", "salt", floor=3.7, distill_steps=10, teacher=teacher)
    run = read_folder(path)
    assert charged_for_teacher(run) is run
    table, _, _ = cost_tables([run], charged=True)
    assert set(cells(table, "teacher: pythia at step 0").values()) >= {NOTHING}
    assert "not known, and not charged" in table.note


def test_a_run_that_goes_on_shows_its_costs_so_far(tmp_path, folders):
    early, late = folders.parts(1e9, stage2=(1, 2.0)), folders.parts(3e9, stage2=(3, 6.0))
    lines = [folders.evaluation(10, **early), folders.training(30, **late)]
    run = read_folder(folders.run(tmp_path / "going", lines))
    flops, times, _ = (cells(table, "going") for table in cost_tables([run], charged=False))
    assert flops["student"] == "3.000 × 10⁹"
    assert times["stage 2"] == times["time, their sum"] == "6.0 s"


def test_wall_time_of_runs_that_recorded_it(tmp_path, folders):
    account = {"starts": 2, "wall_seconds": 100.0, "goodput": 0.75, "lost_steps_seconds": 5.0}
    lines = [
        folders.training(1, wall_time={"wall_seconds": 1.0}),
        folders.training(2, wall_time={**account, "cost": 12.5, "seconds_left": 30.0}),
    ]
    run = read_folder(folders.run(tmp_path / "running", lines))
    *_, table = cost_tables([run], charged=False)
    shown = cells(table, "running")
    assert (shown["wall time"], shown["goodput"], shown["lost steps"]) == (
        "100.0 s",
        "75.00%",
        "5.0 s",
    )
    assert (shown["starts"], shown["cost"], shown["time left"]) == ("2", "12.50", "30.0 s")
    assert "saving" not in shown, "no run says"
    older = read_folder(folders.run(tmp_path / "older", [folders.training(1)]))
    assert len(cost_tables([older], charged=False)) == 3
