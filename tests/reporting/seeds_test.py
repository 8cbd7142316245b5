"""Means, intervals and paired differences against SciPy's own, and what the page says of them."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.reporting.comparison import FLOPS, STEPS
from salt_jax.reporting.plots import USUAL_COLOURS
from salt_jax.reporting.runs import TrainRun, read_folders
from salt_jax.reporting.sections import compose
from salt_jax.reporting.seeds import (
    arms_repeat,
    band,
    by_arm,
    final_seeds_table,
    first_step_at,
    intervals,
    over_seeds,
)
from tests.reporting.conftest import evaluation, summary_of, training, write_arm, write_run

# Log-perplexity at steps 250, 500 and 750, by arm and seed.
CURVES = {
    ("baseline", 0): (4.2, 3.9, 3.70),
    ("baseline", 1): (4.3, 4.0, 3.78),
    ("baseline", 2): (4.1, 3.8, 3.64),
    ("salt", 0): (4.1, 3.8, 3.66),
    ("salt", 1): (4.2, 3.9, 3.75),
    ("salt", 2): (4.0, 3.7, 3.62),
}


@pytest.fixture
def folders(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """Six finished runs; a step of SALT costs a tenth more."""
    return [
        write_study_run(tmp_path / arm / f"seed-{seed}", arm, seed, curve)
        for (arm, seed), curve in CURVES.items()
    ]


def write_study_run(
    folder: pathlib.Path, arm: str, seed: int, curve: tuple[float, ...]
) -> pathlib.Path:
    flops = 1.1e9 if arm == "salt" else 1e9
    steps = (250, 500, 750)
    lines = [
        evaluation(step, nats, accuracy=1 / nats, train_flops=flops * step)
        for step, nats in zip(steps, curve, strict=True)
    ]
    return write_run(folder, [training(750), *lines], summary_of(arm, lines[-1], seed=seed))


@pytest.fixture
def runs(folders: list[pathlib.Path]) -> tuple[TrainRun, ...]:
    return read_folders(folders).runs


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.5, -0.25], [3.0] * 4])
def test_intervals_are_students(values: list[float]) -> None:
    found = intervals(pd.DataFrame([values])).loc[0]
    standard_error = np.std(values, ddof=1) / math.sqrt(len(values))
    expected = scipy.stats.t.ppf(0.975, len(values) - 1) * standard_error
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["half_width"] == pytest.approx(expected)
    assert found["count"] == len(values)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(4000, 3))
    found = intervals(pd.DataFrame(draws))
    held = np.mean((found["mean"] - 5.0).abs() <= found["half_width"])
    assert abs(held - 0.95) < 0.02


def test_one_seed_has_no_interval() -> None:
    found = intervals(pd.DataFrame([[2.0, math.nan], [math.nan, math.inf]]))
    assert found["mean"][0] == 2.0
    assert found["half_width"].isna().all()
    assert found["count"].tolist() == [1, 0]


def test_differences_are_paired_by_seed(runs: tuple[TrainRun, ...]) -> None:
    # In another order: pairs go by seed, not by place.
    baseline, salt = over_seeds([runs[2], runs[0], runs[1], *reversed(runs[3:])])
    assert (baseline.arm, baseline.seeds) == ("baseline", (0, 1, 2))
    assert baseline.final["log_perplexity"]["difference"] is None
    ends = {arm: [CURVES[arm, seed][-1] for seed in range(3)] for arm in ("baseline", "salt")}
    found = salt.final["log_perplexity"]
    assert found["level"]["mean"] == pytest.approx(np.mean(ends["salt"]))
    test = scipy.stats.ttest_rel(ends["salt"], ends["baseline"])
    low, high = test.confidence_interval(0.95)
    assert found["difference"]["mean"] == pytest.approx((low + high) / 2)
    assert found["difference"]["half_width"] == pytest.approx((high - low) / 2)
    # Unpaired, three seeds would tell nothing.
    assert found["difference"]["half_width"] < 0.03 < 0.1 < found["level"]["half_width"]


def test_only_shared_seeds_are_paired(runs: tuple[TrainRun, ...]) -> None:
    _, salt = over_seeds([*runs[:2], *runs[4:]])
    difference = salt.final["log_perplexity"]["difference"]
    assert (difference["count"], salt.seeds) == (1, (1, 2))
    assert difference["mean"] == pytest.approx(3.75 - 3.78)


def test_at_equal_cost(runs: tuple[TrainRun, ...]) -> None:
    _, salt = over_seeds(runs)
    at_steps, at_flops = (
        salt.at_equal[axis.name]["log_perplexity"]["level"]["mean"] for axis in (STEPS, FLOPS)
    )
    assert at_steps == pytest.approx(np.mean([3.66, 3.75, 3.62]))
    # 7.5e11 FLOPs are the baseline's end and 8/11 of the way between SALT's last evaluations.
    part = (7.5e11 / 1.1e9 - 500) / 250
    expected = [a + part * (b - a) for a, b in [(3.8, 3.66), (3.9, 3.75), (3.7, 3.62)]]
    assert at_flops == pytest.approx(np.mean(expected))


def test_steps_to_the_reference(runs: tuple[TrainRun, ...]) -> None:
    baseline, salt = over_seeds(runs)
    shares = []
    for seed in range(3):
        _, left, right = CURVES["salt", seed]
        shares.append((500 + 250 * (left - CURVES["baseline", seed][-1]) / (left - right)) / 750)
    assert salt.seeds_that_got_there == 3
    assert salt.steps_to_reference["mean"] == pytest.approx(np.mean(shares))
    assert baseline.steps_to_reference["mean"] == pytest.approx(1.0)


def test_a_curve_that_never_gets_there(runs: tuple[TrainRun, ...]) -> None:
    assert first_step_at(runs[0].evaluations, 3.0) is None
    assert first_step_at(runs[0].evaluations, 9.0) == 250
    diverged = runs[0].evaluations.assign(log_perplexity=[4.2, math.nan, 3.7])
    assert first_step_at(diverged, 3.0) is None
    assert first_step_at(diverged, 3.9) == 750


def test_band_is_the_mean_at_the_steps_that_all_have(runs: tuple[TrainRun, ...]) -> None:
    shorter = dataclasses.replace(runs[4], evaluations=runs[4].evaluations.iloc[1:])
    found = band([runs[3], shorter, runs[5]], FLOPS, "log_perplexity")
    assert found["at"].tolist() == [5.5e11, 8.25e11]
    np.testing.assert_allclose(found["mean"], [3.8, (3.66 + 3.75 + 3.62) / 3])
    assert np.all(found["half_width"] > 0)


def test_unfinished_runs_and_single_seeds(runs: tuple[TrainRun, ...]) -> None:
    assert arms_repeat(runs)
    assert not arms_repeat([runs[0], runs[3]])
    unfinished = dataclasses.replace(runs[1], facts={})
    assert list(by_arm([runs[0], unfinished])["baseline"]) == [0]


def test_table_marks_what_is_clear(runs: tuple[TrainRun, ...]) -> None:
    table = final_seeds_table(over_seeds(runs), "baseline")
    baseline, salt = table.rows
    assert baseline[3] == "–"
    assert salt[2].startswith("3.6767 ± ")
    assert salt[3].startswith("-0.0300 ± ")
    assert salt[3].endswith(" *")
    assert salt[-1].endswith("(3 of 3)")
    noisy = list(runs)
    assert runs[3].final is not None
    final = pd.Series({**runs[3].final, "log_perplexity": 3.9})
    noisy[3] = dataclasses.replace(runs[3], final=final)
    assert not final_seeds_table(over_seeds(noisy), "baseline").rows[1][3].endswith("*")


def test_the_page_shows_arms_instead_of_runs(
    folders: list[pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    assert main(["report", *map(str, folders), f"--output_dir={output}"]) == 0
    printed = capsys.readouterr().out
    assert "Over seeds, at the end of each run" in printed
    assert "Over seeds, at equal train FLOPs" in printed
    numbers = json.loads((output / "summary.json").read_text())
    assert [one["arm"] for one in numbers["over_seeds"]] == ["baseline", "salt"]
    assert "log_perplexity_by_steps.png" in numbers["plots"]
    assert "with 3 seeds" in (output / "index.html").read_text()


def test_two_sizes_where_the_larger_ones_slm_is_as_large_as_the_smaller_llm(
    tmp_path: pathlib.Path,
) -> None:
    """The SLM is in no comparison; an arm that taught the larger size once is in its own."""
    paths, sizes = [], {"small": (500_000, 100_000), "large": (2_000_000, 500_000)}
    for size, (parameters, of_slm) in sizes.items():
        slm = write_arm(tmp_path / "slm" / size, "slm", floor=4, parameters=of_slm, steps=100)
        paths.append(slm)
        teacher = {"path": str(slm), "step": 100, "digest": size}
        for arm, seed in itertools.product(("baseline", "salt"), (0, 1)):
            own = {"teacher": teacher} if arm == "salt" else {}
            if (size, arm, seed) == ("large", "salt", 0):
                own["teacher"] = {**teacher, "path": str(tmp_path / "baseline/small/seed-0")}
            folder = tmp_path / arm / size / f"seed-{seed}"
            run = {"parameters": parameters, "steps": 150, "noise_seed": seed, "seed": seed}
            paths.append(write_arm(folder, arm, floor=3.5 + seed / 10, **run, **own))
    report = compose(read_folders(paths))
    by_size = [(arm["parameters"], arm["arm"]) for arm in report.numbers["over_seeds"]]
    assert by_size == [(n, arm) for n in (500_000, 2_000_000) for arm in ("baseline", "salt")]
    matched = {match["value"] for match in report.numbers["matched"] if match["axis"] == "steps"}
    assert matched == {150}
    labels = {run["label"]: run["teacher_training"] for run in report.numbers["runs"]}
    assert {"slm/small", "slm/large", "baseline/small/seed-0"} <= labels.keys()
    assert labels["salt/large/seed-1"]["teacher"] == "slm/large at step 100"
    titles = [table.title for table in report.printed if table.title.startswith("Over seeds")]
    assert len({*titles}) == len(titles) == 8
    order = [section.title for section in report.sections]
    small, large = (order.index(f"Over seeds ({n} parameters)") for n in ("500,000", "2,000,000"))
    assert order.index("Over sizes") < small < large


def test_another_reference(folders: list[pathlib.Path]) -> None:
    report = compose(read_folders(folders), reference="salt")
    arms = {one["arm"]: one for one in report.numbers["over_seeds"]}
    assert arms["salt"]["final"]["log_perplexity"]["difference"] is None
    assert arms["baseline"]["final"]["log_perplexity"]["difference"]["mean"] > 0


def test_an_unknown_reference_is_refused(folders: list[pathlib.Path]) -> None:
    with pytest.raises(InputError, match=r"reference is 'slat'.*nearest: salt"):
        compose(read_folders(folders), reference="slat")


def test_seeds_of_an_arm_look_alike(folders: list[pathlib.Path]) -> None:
    looks = compose(read_folders(folders)).looks
    assert looks["salt/seed-0"] == looks["salt/seed-2"] == looks["salt"]
    assert looks["salt"].colour == USUAL_COLOURS["salt"] != looks["baseline/seed-1"].colour
