"""Plots: their images, colours and smoothing."""

import io
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from salt_jax.reporting import plots
from salt_jax.reporting.comparison import AXES, FLOPS, STEPS, cost_at_step, read_at
from salt_jax.reporting.runs import read_folders


def shows(plot, colour):
    """Whether the image has an area of this very colour."""
    pixels = imread(io.BytesIO(plot.png))[..., :3]
    return int(np.all(np.abs(pixels - to_rgb(colour)) < 0.01, axis=-1).sum()) > 100


@pytest.fixture
def material(tmp_path, folders):
    return read_folders(folders.experiment(tmp_path))


def each(*runs):
    """Every run an arm of its own."""
    return {run.label: [run] for run in runs}


@pytest.fixture
def looks(material):
    return plots.styles({run.label: run.arm for run in material.runs})


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
@pytest.mark.parametrize("metric", [plots.LOG_PERPLEXITY, plots.ACCURACY], ids=lambda m: m.name)
def test_every_arm_is_in_the_evaluation_plot(material, looks, axis, metric):
    slm, *arms = material.runs
    plot = plots.evaluation_plot(each(*arms), [slm], looks, axis, metric)
    assert plot.name == f"{metric.name}_by_{axis.name}"
    assert all(shows(plot, looks[run.label].colour) for run in arms)
    assert not shows(plot, looks["slm"].colour)
    assert "salt after step 187" in plot.caption


def test_a_switch_that_the_run_decided_on_is_said_with_its_number(tmp_path, folders):
    watched = {"mean": 0.0123, "below": 20, "n_kd": 187}
    folders.arm(tmp_path, "salt_adaptive", floor=3.6, distill_steps=187, watched=watched)
    (run,) = read_folders([tmp_path]).runs
    looks = plots.styles({run.label: run.arm})
    plot = plots.evaluation_plot(each(run), [], looks, STEPS, plots.LOG_PERPLEXITY)
    assert "salt_adaptive after step 187 (at a running mean of 0.0123)" in plot.caption


def test_the_switch_is_marked_on_the_curve_and_the_axis(material, looks):
    salt = material.runs[3]
    plot = plots.evaluation_plot(each(salt), [], looks, FLOPS, plots.LOG_PERPLEXITY)
    whole = plot.figure.axes[0]
    switch = cost_at_step(salt, FLOPS, 187)
    assert whole.get_xlabel() == "train FLOPs (10¹²)"
    lines = {line.get_marker(): line.get_xdata() for line in whole.lines}
    dotted = [line.get_xdata()[0] for line in whole.lines if line.get_linestyle() == ":"]
    assert dotted == [switch / 1e12]
    assert list(lines["D"]) == [switch / 1e12]
    (height,) = next(line.get_ydata() for line in whole.lines if line.get_marker() == "D")
    assert read_at(salt.evaluations, FLOPS, switch)["log_perplexity"] == pytest.approx(height)
    training = plots.training_plot([salt], looks).figure.axes[0]
    assert [187] in [list(line.get_xdata())[:1] for line in training.lines]


def test_the_second_half_is_enlarged(material, looks):
    baseline, rkd = material.runs[1:3]
    plot = plots.evaluation_plot(each(baseline, rkd), [], looks, STEPS, plots.LOG_PERPLEXITY)
    whole, half = plot.figure.axes
    left, right = half.get_xlim()
    low, high = half.get_ylim()
    assert left == 375
    assert right == pytest.approx(750, rel=0.02)
    assert low < baseline.final["log_perplexity"] < rkd.final["log_perplexity"] < high
    assert high - low < 0.3 * (whole.get_ylim()[1] - whole.get_ylim()[0])


def test_an_arm_left_out_is_not_in_the_plot(material, looks):
    plot = plots.evaluation_plot(each(*material.runs[1:3]), [], looks, STEPS, plots.ACCURACY)
    assert not shows(plot, looks["salt"].colour)
    assert "Switch" not in plot.caption


def test_training_plot(material, looks):
    plot = plots.training_plot(material.runs[1:], looks)
    assert all(shows(plot, looks[run.label].colour) for run in material.runs[1:])


def test_score_plot_shows_the_cut(material):
    (scored,), (selected,) = material.scores, material.selections
    with_cut = plots.score_plot(scored, [selected])
    assert f"cut at {selected.cut:.3f}" in with_cut.caption
    assert "207 more have none (−∞)" in with_cut.caption
    (panel,) = with_cut.figure.axes
    assert [line.get_xdata()[0] for line in panel.lines] == [selected.cut]
    assert not plots.score_plot(scored, []).figure.axes[0].lines


def test_plots_of_odd_runs_are_made(tmp_path, folders):
    runs = read_folders(
        [
            folders.run(tmp_path / "_one$x$", [folders.evaluation(10)]),
            folders.run(tmp_path / "lost", [folders.evaluation(10, None), folders.training(5)]),
            folders.run(tmp_path / "trained", [folders.training(step) for step in (5, 10)]),
            folders.run(tmp_path / "start", [folders.evaluation(0)]),
        ]
    ).runs
    looks = plots.styles({run.label: run.arm for run in runs})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for axis in AXES:
            plots.evaluation_plot(each(*runs), [], looks, axis, plots.LOG_PERPLEXITY)
            plots.evaluation_plot(each(runs[3]), [], looks, axis, plots.LOG_PERPLEXITY)
        plot = plots.training_plot(runs, looks)
    (legend,) = plot.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("_one$x$", "lost", "trained", "start")
    ]
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_scores_that_are_all_missing_make_a_plot(tmp_path, folders):
    folders.scores(tmp_path / "scores", rows=1)
    (scored,) = read_folders([tmp_path / "scores"]).scores
    assert "all 0 rows" in plots.score_plot(scored, []).caption


def test_the_usual_arms_keep_their_colours():
    alone = plots.styles({"salt": "salt"})
    together = plots.styles({"mine": "mine", "slm": "baseline", "baseline": "baseline"})
    assert alone["salt"].colour == plots.USUAL_COLOURS["salt"]
    assert together["baseline"].colour == plots.USUAL_COLOURS["baseline"]
    assert together["slm"].colour != together["baseline"].colour


def test_many_runs_are_told_apart():
    labels = [f"run {number}" for number in range(20)]
    looks = plots.styles({label: label for label in labels})
    assert len({(look.colour, look.dash) for look in looks.values()}) == 20


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([0, 3, 6, 9], 3, [1.5, 3, 6, 7.5]),
        ([1, 5, 2], 1, [1, 5, 2]),
        ([1, np.nan, 3], 3, [1, 2, 3]),
        ([np.nan, np.nan], 1, [np.nan, np.nan]),
        ([], 5, []),
    ],
)
def test_smoothing(values, window, expected):
    np.testing.assert_allclose(plots.smoothed(pd.Series(values, dtype=float), window), expected)


def test_matplotlib_is_left_as_it_was(material, looks):
    before = dict(matplotlib.rcParams)
    plots.evaluation_plot(each(*material.runs), [], looks, FLOPS, plots.ACCURACY)
    assert dict(matplotlib.rcParams) == before
