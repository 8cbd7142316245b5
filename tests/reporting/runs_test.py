"""Reading run folders: what is found in them, and what is refused by name."""

import json
import math

import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.reporting.runs import (
    ScoreFolder,
    SelectionFolder,
    TrainRun,
    read_folder,
    read_folders,
)


def test_reads_a_finished_run(tmp_path, folders):
    by_subset = {"Github": {"log_perplexity": 3.0, "next_token_accuracy": 0.4, "tokens": 7}}
    lines = [
        folders.training(50, 4.5, stage=1),
        folders.evaluation(50, 4.4),
        folders.training(100, 4.2, skipped_updates=2),
        folders.evaluation(100, 4.1, 0.31, by_subset=by_subset),
    ]
    summary = folders.summary_of("salt", lines[-1], distill_steps=60, skipped_updates=2)
    run = read_folder(folders.run(tmp_path / "run", lines, summary))
    assert isinstance(run, TrainRun)
    assert (run.arm, run.seed, run.parameters, run.finished) == ("salt", 0, 2_200_000, True)
    assert (run.last_step, run.switch_step, run.skipped_updates) == (100, 60, 2)
    assert run.evaluations[["step", "log_perplexity"]].values.tolist() == [[50, 4.4], [100, 4.1]]
    assert run.training["stage"].tolist() == [1, 2]
    assert run.final is not None
    assert run.final.next_token_accuracy == 0.31
    assert run.final.train_flops == 1e11
    assert run.by_subset.loc["Github", "tokens"] == 7
    assert run.origin.command_line.startswith("salt train --gin_file=runs/smoke.gin")
    assert "config.TrainConfig.steps = 750" in run.origin.config


def test_the_later_of_two_lines_for_a_step_wins(tmp_path, folders):
    lines = [
        folders.evaluation(10, 5.0),
        folders.evaluation(20, 4.5),
        folders.training(20, 4.6),
        folders.evaluation(10, 5.1),  # killed, and resumed from before step 10
        folders.training(20, 4.7),
    ]
    run = read_folder(folders.run(tmp_path / "run", lines))
    assert run.evaluations[["step", "log_perplexity"]].values.tolist() == [[10, 5.1], [20, 4.5]]
    assert run.training["loss"].tolist() == [4.7]


def test_only_the_validation_split_makes_the_curve(tmp_path, folders):
    lines = [folders.evaluation(10, 5.0), folders.evaluation(10, 1.0, split="test")]
    run = read_folder(folders.run(tmp_path / "run", lines))
    assert run.evaluations["log_perplexity"].tolist() == [5.0]


def test_a_half_written_line_is_left_out_and_counted(tmp_path, folders):
    lines = [folders.evaluation(10), folders.training(10)]
    run = read_folder(folders.run(tmp_path / "run", lines, tail='{"kind": "eval", "step": 2'))
    assert run.skipped_lines == 1
    assert run.evaluations["step"].tolist() == [10]


def test_an_unfinished_run_is_called_like_its_folder(tmp_path, folders):
    lines = [
        folders.training(10, stage=1),
        folders.training(20, stage=1),
        folders.training(30),
        folders.evaluation(30, 4.2),
    ]
    run = read_folder(folders.run(tmp_path / "salt_now", lines))
    assert (run.arm, run.finished, run.parameters, run.last_step) == ("salt_now", False, None, 30)
    assert run.switch_step == 20
    assert run.final is not None
    assert run.final.equals(run.evaluations.iloc[-1])


@pytest.mark.parametrize("distill_steps", [0, 100])
def test_a_run_with_one_stage_has_no_switch(tmp_path, folders, distill_steps):
    lines = [folders.evaluation(100)]
    summary = folders.summary_of("rkd", lines[-1], distill_steps=distill_steps)
    assert read_folder(folders.run(tmp_path / "run", lines, summary)).switch_step is None


def test_null_stands_for_a_number_that_was_not_finite(tmp_path, folders):
    run = read_folder(folders.run(tmp_path / "run", [folders.evaluation(10, None)]))
    assert math.isnan(run.evaluations["log_perplexity"][0])


def test_reads_scores_and_selections(tmp_path, folders):
    scores = folders.scores(tmp_path / "scores", rows=500)
    folders.selection(tmp_path / "selected", scores, rows=100)
    scored = read_folder(tmp_path / "scores")
    selected = read_folder(tmp_path / "selected")
    assert isinstance(scored, ScoreFolder)
    assert isinstance(selected, SelectionFolder)
    assert scored.scores.shape == (500,)
    assert selected.selection.row_ids.shape == (100,)
    assert selected.selection.manifest["scores_digest"] == scored.rows.digest
    assert selected.cut == pytest.approx(float(np.sort(scored.scores)[-100]))


def test_sorts_folders_by_what_they_hold(tmp_path, folders):
    material = read_folders(folders.experiment(tmp_path))
    assert [run.label for run in material.runs] == ["slm", "baseline", "rkd", "salt", "salt_ds"]
    assert (len(material.scores), len(material.selections)) == (1, 1)


def test_arms_that_repeat_are_told_apart_by_their_paths(tmp_path, folders):
    for place in ("seed0/salt", "seed1/salt", "other"):
        lines = [folders.evaluation(10)]
        arm = "salt" if "salt" in place else "baseline"
        folders.run(tmp_path / place, lines, folders.summary_of(arm, lines[0]))
    paths = [tmp_path / "seed0/salt", tmp_path / "seed1/salt", tmp_path / "other"]
    labels = [run.label for run in read_folders(paths).runs]
    assert labels == ["seed0/salt", "seed1/salt", "baseline"]


def _no_metrics(path, folders):
    folders.origin(path, "train")


def _no_measurement(path, folders):
    folders.run(path, [])


def _another_verb(path, folders):
    folders.origin(path, "prepare")


def _an_experiment(path, folders):
    folders.run(path / "salt", [folders.evaluation(1)])


def _missing_value(path, folders):
    line = folders.evaluation(3)
    del line["seconds"]
    folders.run(path, [folders.evaluation(1), line])


def _text_for_a_number(path, folders):
    folders.run(path, [folders.evaluation(1, "4.0")])


def _more_digits_than_a_number_has(path, folders):
    folders.run(path, [folders.evaluation(1, 10**400)])


def _broken_summary(path, folders):
    folders.run(path, [folders.evaluation(1)])
    (path / "summary.json").write_text('{"arm": "sa')


def _text_in_the_summary(path, folders):
    line = folders.evaluation(1)
    folders.run(path, [line], folders.summary_of("salt", line, parameters="many"))


def _empty_summary_value(path, folders):
    line = folders.evaluation(1)
    summary = folders.summary_of("salt", line)
    del summary["log_perplexity"]
    folders.run(path, [line], summary)


def _half_written_scores(path, folders):
    folders.scores(path, rows=50)
    (path / "COMPLETED").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path, folders: None, ["no folder"]),
        (lambda path, folders: path.mkdir(), ["holds no run", "salt train"]),
        (_another_verb, ["`salt prepare`"]),
        (_an_experiment, ["holds no run", "give those: salt"]),
        (_no_metrics, ["metrics.jsonl"]),
        (_no_measurement, ["no measurement yet"]),
        (_missing_value, ["line 2", "seconds is missing"]),
        (_text_for_a_number, ["line 1", "log_perplexity is '4.0'"]),
        (_more_digits_than_a_number_has, ["line 1", "log_perplexity is 1000"]),
        (_text_in_the_summary, ["summary.json", 'parameters is "many", expected a whole number']),
        (_broken_summary, ["summary.json", "is not readable JSON"]),
        (_empty_summary_value, ["summary.json", "log_perplexity is missing"]),
        (_half_written_scores, ["COMPLETED"]),
    ],
)
def test_refuses_by_name(tmp_path, folders, damage, words):
    path = tmp_path / "given"
    damage(path, folders)
    with pytest.raises(InputError) as refusal:
        read_folders([path])
    for word in [str(path), *words]:
        assert word in str(refusal.value)


def test_refuses_no_folders_and_one_folder_twice(tmp_path, folders):
    with pytest.raises(InputError, match="at least one folder"):
        read_folders([])
    run = folders.run(tmp_path / "run", [folders.evaluation(1)])
    with pytest.raises(InputError, match="given twice"):
        read_folders([run, tmp_path / "." / "run"])


def test_run_json_may_hold_the_command_line_as_text(tmp_path, folders):
    run = folders.run(tmp_path / "run", [folders.evaluation(1)])
    origin = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**origin, "command_line": "salt train --x='a b'"}))
    assert read_folder(run).origin.command_line == "salt train --x='a b'"
