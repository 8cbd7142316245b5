"""The laws over sizes, from made-up runs whose laws are known."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from salt_jax.main import main
from salt_jax.reporting.ladder import Ladder, fit_ladder, ladder_table
from salt_jax.reporting.runs import read_folders
from tests.reporting.conftest import evaluation, summary_of, write_run

SIZES = (500_000, 1_500_000, 4_000_000, 10_000_000)
E, A, ALPHA = 2.0, 60.0, 0.12
# What an arm costs over the baseline, and its law: SALT takes 0.8 of the baseline's FLOPs at any
# size; "fading" takes 0.7 of them at 1e13 and 0.8 times its own share for every tenfold.
COSTS = {"baseline": 1.0, "salt": 1.03, "fading": 1.05}
FADES = 0.15
Noise = Callable[[int, str], float]


def true_loss(arm: str, flops: float) -> float:
    if arm == "salt":
        flops /= 0.8
    if arm == "fading":
        # flops = 0.7 · C · (C / 1e13)^FADES, solved for the baseline's C.
        flops = (flops / 0.7 * 1e13**FADES) ** (1 / (1 + FADES))
    return E + A * flops**-ALPHA


def write_ladder(
    folder: pathlib.Path,
    sizes: tuple[int, ...] = SIZES,
    seeds: int = 3,
    noise: Noise = lambda seed, arm: 0.0,
) -> list[pathlib.Path]:
    made = []
    for arm, cost in COSTS.items():
        for size in sizes:
            for seed in range(seeds):
                flops = 6.0 * size * size * cost
                nats = true_loss(arm, flops) + noise(seed, arm)
                line = evaluation(750, nats, train_flops=flops)
                facts = summary_of(arm, line, seed=seed, parameters=size)
                made.append(write_run(folder / arm / str(size) / f"seed-{seed}", [line], facts))
    return made


def ladder_of(folders: list[pathlib.Path]) -> Ladder:
    found = fit_ladder(read_folders(folders).runs, "baseline")
    assert found is not None
    return found


def savings(size: int) -> dict[str, float]:
    """At the baseline's FLOPs of a size."""
    return {"salt": 0.2, "fading": 1 - 0.7 * (6.0 * size * size / 1e13) ** FADES}


def test_known_laws_are_found(tmp_path: pathlib.Path) -> None:
    ladder = ladder_of(write_ladder(tmp_path))
    assert ladder.arms == ("baseline", "salt", "fading")
    assert ladder.least().values == pytest.approx(E, abs=1e-4)
    exponents = [float(ladder.alpha(arm).values) for arm in range(3)]
    assert exponents == pytest.approx([ALPHA, ALPHA, ALPHA / (1 + FADES)], rel=1e-3)
    for arm, name in enumerate(ladder.arms[1:], start=1):
        expected = [savings(size)[name] for size in SIZES]
        np.testing.assert_allclose(ladder.saving(arm, ladder.logs[0]).values, expected, atol=1e-3)
    assert ladder.trend(1).values == pytest.approx(1.0, abs=1e-3)
    assert ladder.trend(2).values == pytest.approx(10**FADES, rel=1e-3)
    assert ladder.seeds == (3, 3, 3, 3)
    # Seeds that agree leave no band.
    assert ladder.trend(2).high - ladder.trend(2).low < 1e-6


def test_three_sizes_give_a_straight_line_in_logarithms(tmp_path: pathlib.Path) -> None:
    folders = write_ladder(tmp_path, SIZES[:3], seeds=1)
    ladder = ladder_of(folders)
    assert ladder.least().values == 0.0
    assert np.isnan(ladder.least().low)
    # With an exponent that is smaller, and nearly the same saving at each size.
    assert 0 < ladder.alpha(0).values < ALPHA
    for at, size in enumerate(SIZES[:3]):
        found = ladder.saving(1, ladder.logs[0, at]).values
        assert found == pytest.approx(savings(size)["salt"], abs=0.04)
    assert "[" not in str(ladder_table(ladder).rows)
    assert fit_ladder(read_folders(folders[:2]).runs, "baseline") is None


def test_bands_hold_the_truth_as_often_as_they_say(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three seeds whose noise is mostly that of a seed, which all arms share."""
    monkeypatch.setattr("salt_jax.reporting.ladder.FITS", 100)
    held, trials, generator = {"saving": 0, "trend": 0}, 30, np.random.default_rng(0)
    runs = read_folders(write_ladder(tmp_path)).runs
    for _ in range(trials):
        by_seed = {(size, seed): 0.02 * generator.normal() for size in SIZES for seed in range(3)}
        noisy = []
        for run in runs:
            assert run.final is not None
            final = run.final.copy()
            final["log_perplexity"] += by_seed[run.parameters, run.seed]
            final["log_perplexity"] += 0.006 * generator.normal()
            noisy.append(dataclasses.replace(run, final=final))
        ladder = fit_ladder(noisy, "baseline")
        assert ladder is not None
        saving, trend = ladder.saving(1, ladder.logs[0, 2]), ladder.trend(2)
        held["saving"] += bool(saving.low <= 0.2 <= saving.high)
        held["trend"] += bool(trend.low <= 10**FADES <= trend.high)
    assert all(0.8 * trials <= count for count in held.values()), held


def test_the_page_has_the_laws(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    offsets = np.random.default_rng(3).normal(size=3) * 0.01

    def noise(seed: int, arm: str) -> float:
        return float(offsets[seed]) + 0.002 * math.sin(9 * seed + len(arm))

    folders = write_ladder(tmp_path / "runs", noise=noise)
    # An arm with two sizes, the SLMs, and an unfinished run are not in the ladder.
    line = evaluation(750, 3.0)
    for size in SIZES[:2]:
        facts = summary_of("rare", line, parameters=size)
        folders.append(write_run(tmp_path / "rare" / str(size), [line], facts))
    for size in (1000, 2000, 3000):
        facts = summary_of("slm", line, parameters=size)
        folders.append(write_run(tmp_path / "slm" / str(size), [line], facts))
    folders.append(write_run(tmp_path / "unfinished", [evaluation(750, 2.0)]))
    out = tmp_path / "out"
    assert main(["report", *map(str, folders), f"--output_dir={out}"]) == 0
    page = (out / "index.html").read_text()
    assert "E belongs to the text and is the same for all arms: 2." in page
    assert "FLOPs saved to reach the loss of baseline" in page
    assert (out / "ladder.png").exists()
    (numbers,) = json.loads((out / "summary.json").read_text())["ladders"]
    assert [one["arm"] for one in numbers["arms"]] == ["baseline", "salt", "fading"]
    value, low, high = numbers["arms"][1]["saving"][0]
    assert low < value < high
    assert value == pytest.approx(0.2, abs=0.05)
    table = ladder_table(ladder_of(folders))
    assert table.rows[0][2:] == ("–",) * 5
    assert table.rows[1][2].endswith("] *")
    # Over seeds, every arm at every size.
    over_seeds = json.loads((out / "summary.json").read_text())["over_seeds"]
    assert {(one["arm"], one["parameters"]) for one in over_seeds} >= {
        (arm, size) for arm in COSTS for size in SIZES
    }


def test_two_sizes_are_too_few(tmp_path: pathlib.Path) -> None:
    folders = write_ladder(tmp_path / "runs", SIZES[:2], seeds=1)
    out = tmp_path / "out"
    assert main(["report", *map(str, folders), f"--output_dir={out}"]) == 0
    sentence = "There are 2 sizes, and a law of loss over FLOPs takes three: add a size."
    assert sentence in (out / "index.html").read_text()
    assert json.loads((out / "summary.json").read_text())["ladders"] == []


def test_an_arm_that_lacks_a_size_or_a_seed(tmp_path: pathlib.Path) -> None:
    """As in a study that is still going."""
    folders = write_ladder(tmp_path)
    left = [
        f
        for f in folders
        if "salt/10000000" not in str(f) and "fading/4000000/seed-2" not in str(f)
    ]
    ladder = ladder_of(left)
    assert np.isnan(ladder.logs[1, 3])
    assert ladder.least().values == pytest.approx(E, abs=1e-4)
    rows = ladder_table(ladder).rows
    assert rows[1][5] == "–"
    assert rows[1][4].startswith("20.0%")
    assert json.loads(json.dumps(ladder.to_json()))["arms"][2]["saving"][3][0] == pytest.approx(
        savings(SIZES[3])["fading"], abs=1e-3
    )
