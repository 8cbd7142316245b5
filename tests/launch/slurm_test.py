"""launch/slurm.sh and the job it submits, against stand-ins for sbatch, srun and scontrol."""

import pathlib
import shutil
import subprocess
from typing import Any

import pytest

JOB = ["--job-name=nano", "--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1"]
FLAGS = ["--name=nano", "--nodes=2", "--gpus-per-node=1"]


@pytest.fixture
def folder(launch: Any) -> pathlib.Path:
    return pathlib.Path(launch.folder / "the jobs" / "nano")


def submit(launch: Any, folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = launch(
        "slurm.sh", *FLAGS, f"--folder={folder}", *arguments
    )
    return done


def run_job(launch: Any, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs the job that was submitted last as SLURM does: from a copy of the script."""
    words = launch.calls("sbatch")[-1]
    first = [word.startswith("--") for word in words].index(False)
    copy = launch.folder / "slurm_script"
    shutil.copy(words[first], copy)
    environment = {**launch.environment, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    return subprocess.run(
        ["bash", copy, *words[first + 1 :]],
        env={k: v for k, v in environment.items() if k != "VENV"},
        cwd=launch.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_job(launch: Any, folder: pathlib.Path) -> None:
    flags = ["--time=24:00:00", "--partition=h100", "--extra=--account=team", "--save-seconds=60"]
    ended = submit(launch, folder, *flags, "--", "salt", "train", "--output_dir=/lustre/run")
    assert ended.returncode == 0, ended.stderr
    [words] = launch.calls("sbatch")
    script = folder / "salt_jax/launch/slurm_job.sh"
    salt = launch.folder / "venv/bin/salt"
    assert words == [
        *JOB,
        "--time=24:00:00",
        "--partition=h100",
        "--requeue",
        "--signal=TERM@60",
        "--open-mode=append",
        f"--output={folder}/log",
        "--account=team",
        str(script),
        str(folder),
        "3",
        "600",
        str(salt),
        "train",
        "--output_dir=/lustre/run",
        "--multi_process=True",
    ]
    assert script.exists(), "the job runs a copy, whatever becomes of the clone"
    versions, _ = [words for words in launch.calls("python") if "install" in words]
    assert versions[-1] == "jax[cuda13]"


def test_words_arrive_as_they_are_at_every_task(launch: Any, folder: pathlib.Path) -> None:
    assert submit(launch, folder, "--", "train", *launch.awkward).returncode == 0
    ran = run_job(launch, folder)
    assert ran.returncode == 0, ran.stderr
    assert launch.calls("salt") == [["train", *launch.awkward, "--multi_process=True"]] * 2
    assert launch.calls("srun")[0][0] == "--kill-on-bad-exit=0"
    assert not launch.calls("scontrol")


def test_interrupted_jobs_are_queued_again(launch: Any, folder: pathlib.Path) -> None:
    launch.reply(salt_0=[75, 75, 0], salt_1=[75, 75, 0])
    submit(launch, folder, "--max-failures=0", "--min-run-seconds=0", *launch.train)
    assert [run_job(launch, folder).returncode for _ in range(3)] == [0, 0, 0]
    assert launch.calls("scontrol") == [["requeue", "7"]] * 2


def test_what_interrupts_every_start_ends_it(launch: Any, folder: pathlib.Path) -> None:
    """A start that ran long enough before it was interrupted has the count begin anew."""
    launch.reply(salt_0=[75], salt_1=[75])
    submit(launch, folder, "--max-failures=1", *launch.train)
    codes = []
    for seconds in (0, 600, 599, 0):
        launch.each_run_takes(seconds)
        ended = run_job(launch, folder)
        codes.append(ended.returncode)
    assert codes == [0, 0, 0, 1]
    assert "salt was interrupted (exit code 75)" in ended.stderr
    assert "failure 2 in a row, more than --max-failures=1" in ended.stderr
    assert len(launch.calls("scontrol")) == 3


def test_refused_input_is_not_queued_again(launch: Any, folder: pathlib.Path) -> None:
    launch.reply(salt_0=[2], salt_1=[75])
    submit(launch, folder, *launch.train)
    ended = run_job(launch, folder)
    assert ended.returncode == 2
    assert "slurm_job.sh: salt refused its input" in ended.stderr
    assert not launch.calls("scontrol")


def test_failures_are_counted_from_one_start_to_the_next(launch: Any, folder: pathlib.Path) -> None:
    """One task fails, the other saves and asks to be started again: that alone would never end."""
    launch.reply(salt_0=[75], salt_1=[1])
    submit(launch, folder, "--max-failures=1", *launch.train)
    assert [run_job(launch, folder).returncode for _ in range(2)] == [0, 1]
    assert len(launch.calls("scontrol")) == 1
    submit(launch, folder, "--max-failures=1", *launch.train)
    assert run_job(launch, folder).returncode == 0, "a new job counts from the beginning"


def test_a_task_without_an_exit_code_is_a_failure(launch: Any, folder: pathlib.Path) -> None:
    launch.reply(srun=[1])
    submit(launch, folder, "--max-failures=0", *launch.train)
    (launch.folder / "bin/srun").write_text("#!/bin/sh\nexit 1\n")
    ended = run_job(launch, folder)
    assert ended.returncode == 1
    assert "failed (exit code 137)" in ended.stderr


def test_a_job_of_that_name_keeps_its_copy(launch: Any, folder: pathlib.Path) -> None:
    launch.reply(jobs=["7 h100 nano"])
    ended = submit(launch, folder, *launch.train)
    assert ended.returncode == 2
    assert "change --name" in ended.stderr
    assert launch.calls("squeue") == [["--noheader", "--me", "--name=nano"]]
    assert not launch.calls("sbatch")


def test_a_dry_run_runs_nothing(launch: Any, folder: pathlib.Path) -> None:
    shown = submit(launch, folder, "--dry-run", "--", "train", *launch.awkward)
    assert shown.returncode == 0, shown.stderr
    assert launch.log() == []
    assert not folder.exists()
    ran = submit(launch, folder, "--", "train", *launch.awkward)
    lines = [line[2:] for line in ran.stdout.splitlines() if line.startswith("$ ")]
    assert lines == shown.stdout.splitlines()
