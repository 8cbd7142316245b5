"""`salt report` as a whole: the files it leaves and what it prints."""

import json

import pytest

from salt_jax.commands.report import VERB, report
from salt_jax.errors import InputError
from salt_jax.storage.run_folder import RunFolder


def output(path, config="report.report.runs = ()\n"):
    return RunFolder(path, "report", lambda: config, ["salt", "report"])


def test_writes_the_page_its_plots_and_the_numbers(tmp_path, folders, capsys):
    paths = [str(path) for path in folders.experiment(tmp_path / "runs")]
    report(output(tmp_path / "report"), runs=paths, title="Four arms")
    page = (tmp_path / "report" / "index.html").read_text()
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert "<h1>Four arms</h1>" in page
    assert len(summary["plots"]) == 8
    for name in summary["plots"]:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert [run["label"] for run in summary["runs"]] == [
        "slm",
        "baseline",
        "rkd",
        "salt",
        "salt_ds",
    ]
    assert summary["runs"][3]["switch_step"] == 187
    at_equal = {match["axis"]: match for match in summary["matched"]}
    assert at_equal["steps"]["value"] == 750
    assert at_equal["train_flops"]["value"] == summary["runs"][1]["train_flops"]
    assert [arm["label"] for arm in at_equal["seconds"]["arms"]] == [
        *("baseline", "rkd", "salt", "salt_ds")
    ]
    assert summary["selections"][0]["rows"] == 5000
    printed = capsys.readouterr().out
    assert "Results at the end of each run" in printed
    assert "At equal train FLOPs" in printed
    for details in ("Model FLOPs by what they were spent on", "By subset"):
        assert details in page
        assert details not in printed
    assert printed.rstrip().endswith(str(tmp_path / "report" / "index.html"))


def test_names_are_printed_as_they_are(tmp_path, folders, capsys):
    lines = [folders.evaluation(10)]
    run = folders.run(tmp_path / "run", lines, folders.summary_of("[red]x[/red]", lines[0]))
    report(output(tmp_path / "report"), runs=[str(run)])
    assert "[red]x[/red]" in capsys.readouterr().out


def test_a_run_that_diverged_is_reported(tmp_path, folders):
    lines = [folders.evaluation(5), folders.evaluation(10, None, 1.0)]  # NaN's accuracy was 1
    paths = [
        str(folders.run(tmp_path / arm, lines, folders.summary_of(arm, lines[-1])))
        for arm in ("baseline", "salt")
    ]
    report(output(tmp_path / "report"), runs=paths)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["runs"][0]["log_perplexity"] is None
    assert summary["runs"][0]["next_token_accuracy"] is None
    assert "not finite" in (tmp_path / "report" / "index.html").read_text()


def test_a_report_may_be_made_again_with_more_runs(tmp_path, folders):
    first = folders.arm(tmp_path / "baseline", "baseline", floor=3.7)
    second = folders.arm(tmp_path / "salt", "salt", floor=3.6)
    report(output(tmp_path / "report", "report.runs = (1,)\n"), runs=[str(first)])
    report(output(tmp_path / "report", "report.runs = (2,)\n"), runs=[str(first), str(second)])
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert len(summary["runs"]) == 2


def test_teachers_are_charged_when_asked(tmp_path, folders):
    paths = [str(path) for path in folders.experiment(tmp_path / "runs")]
    seconds = {}
    for name, charge in (("plain", False), ("charged", True)):
        report(output(tmp_path / name), runs=paths, charge_teacher_training=charge)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        seconds[name] = {run["label"]: run["seconds"] for run in summary["runs"]}
        assert summary["charge_teacher_training"] is charge
    slm = seconds["plain"]["slm"]
    assert seconds["charged"]["salt"] == pytest.approx(seconds["plain"]["salt"] + slm)
    assert seconds["charged"]["baseline"] == seconds["plain"]["baseline"]


@pytest.mark.parametrize("runs", [[], ["nowhere"], "nowhere"])
def test_bad_input_leaves_nothing_behind(tmp_path, runs):
    with pytest.raises(InputError):
        report(output(tmp_path / "report"), runs=runs)
    assert not (tmp_path / "report").exists()


def test_folders_are_given_without_a_flag():
    assert VERB.positional == "runs"
