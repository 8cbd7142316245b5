"""The switch's health and the spikes of a loss, from lines of metrics."""

import numpy as np
import pytest

from salt_jax.reporting import stability
from salt_jax.reporting.runs import read_folders
from salt_jax.reporting.sections import compose

from .conftest import evaluation, training, write_run


def write(folder, losses, switch=0, **values):
    """A run of which every step has a line; the last `switch` steps' stage is 1."""
    lines = []
    for step, loss in enumerate(losses, start=1):
        stage = 1 if step <= switch else 2
        own = {name: value(step) for name, value in values.items()}
        lines.append(training(step, loss, stage, **own))
    return write_run(folder, [*lines, evaluation(len(losses))])


def runs_of(*folders):
    return read_folders(list(folders)).runs


def test_the_switch_is_seen_from_both_sides(tmp_path):
    folder = write(
        tmp_path / "salt",
        [3.0] * 120 + [2.0] * 120,
        switch=120,
        grad_norm=lambda step: 1.0 if step <= 70 else 2.0 if step <= 170 else 9.0,
        update_norm=lambda step: 0.5 if step <= 120 else 0.25,
    )
    (table,) = [stability.switch_table(runs_of(folder))]
    (row,) = table.rows
    assert row == ("salt", "120", "3 → 2", "3 → 2", "2 → 2", "0.5 → 0.25")
    page = compose(read_folders([folder]))
    assert "Stability" in [section.title for section in page.sections]


def test_no_switch_no_table(tmp_path):
    assert stability.switch_table(runs_of(write(tmp_path / "a", [3.0] * 20))) is None
    all_stage1 = runs_of(write(tmp_path / "b", [3.0] * 20, switch=20))
    assert stability.switch_table(all_stage1) is None


def test_spikes_are_found_and_noise_is_not(tmp_path):
    rng = np.random.default_rng(0)
    losses = 3 * np.exp(-np.arange(400) / 300) + 2 + 0.05 * rng.standard_normal(400)
    quiet = runs_of(write(tmp_path / "quiet", losses.tolist()))
    assert stability.spikes(quiet[0].training).empty
    assert stability.spikes_table(quiet) is None
    losses[200:203] += [1.0, 2.0, 1.5]
    losses[300] += 0.9
    (run,) = runs_of(write(tmp_path / "wild", losses.tolist(), grad_norm=lambda step: step))
    found = stability.spikes(run.training)
    assert found[["step", "lines"]].values.tolist() == [[202, 3], [301, 1]]
    assert found["usual"].iloc[0] == pytest.approx(np.median(losses[150:200]), abs=1e-6)
    table = stability.spikes_table([run])
    assert [row[1] for row in table.rows] == ["202", "301"], "the highest comes first"
    assert table.rows[0][4] == "202"


def test_the_jump_at_the_switch_is_no_spike(tmp_path):
    losses = [2.0 + 0.001 * (step % 7) for step in range(60)]
    losses += [3.0 + 0.001 * (step % 5) for step in range(60)]
    (run,) = runs_of(write(tmp_path / "a", losses, switch=60))
    assert stability.spikes(run.training).empty
    (run,) = runs_of(write(tmp_path / "b", losses))
    assert len(stability.spikes(run.training)), "in one stage it would be"
