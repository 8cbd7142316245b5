"""launch/gpu.sh: one process on this machine, started again by its exit code."""

import os
import signal
from typing import Any

import pytest

FLAGS = ["--poll-seconds=0"]


def test_words_arrive_as_they_are(launch: Any) -> None:
    ended = launch("gpu.sh", *FLAGS, "--", "salt", "train", *launch.awkward)
    assert ended.returncode == 0, ended.stderr
    assert launch.calls("salt") == [["train", *launch.awkward]]


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_the_environment_has_the_locked_versions_and_cuda(launch: Any, cuda: str) -> None:
    assert launch("gpu.sh", *FLAGS, f"--cuda={cuda}", *launch.train).returncode == 0
    [versions, package] = [words for words in launch.calls("python") if "install" in words]
    lock = launch.clone / "requirements/lock-3.12.txt"
    assert versions[-2:] == [f"--requirement={lock}", f"jax[cuda{cuda}]"]
    assert package[-1] == str(launch.clone)


def test_the_environment_is_made_once(launch: Any) -> None:
    for _ in range(2):
        assert launch("gpu.sh", *FLAGS, *launch.train).returncode == 0
    assert len([words for words in launch.calls("python") if "install" in words]) == 2
    assert launch("gpu.sh", *FLAGS, "--cuda=12", *launch.train).returncode == 0
    assert len([words for words in launch.calls("python") if "install" in words]) == 4


@pytest.mark.parametrize(
    ("codes", "failures", "code", "starts"),
    [
        ([75, 75, 0], 0, 0, 3),
        ([2], 3, 2, 1),
        ([1, 134, 0], 2, 0, 3),
        ([1, 134, 0], 1, 1, 2),
        ([1, 75, 134, 0], 1, 0, 4),
        ([1], 0, 1, 1),
    ],
)
def test_what_an_exit_code_means(
    launch: Any, codes: list[int], failures: int, code: int, starts: int
) -> None:
    launch.reply(salt_home=codes)
    flags = [*FLAGS, "--min-run-seconds=0", f"--max-failures={failures}"]
    ended = launch("gpu.sh", *flags, *launch.train)
    assert (ended.returncode, len(launch.calls("salt"))) == (code, starts), ended.stderr


def test_what_interrupts_every_start_ends_it(launch: Any) -> None:
    launch.reply(salt_home=[75, 75, 75, 75, 0])
    ended = launch("gpu.sh", *FLAGS, *launch.train)
    assert ended.returncode == 1
    assert len(launch.calls("salt")) == 4
    assert "before --min-run-seconds=600, failure 4 in a row, more than --max-fai" in ended.stderr


@pytest.mark.parametrize(("seconds", "code", "starts"), [(600, 0, 4), (599, 1, 1)])
def test_an_interruption_counts_by_how_long_the_command_ran(
    launch: Any, seconds: int, code: int, starts: int
) -> None:
    launch.reply(salt_home=[75, 75, 75, 0])
    launch.each_run_takes(seconds)
    ended = launch("gpu.sh", *FLAGS, "--max-failures=0", *launch.train)
    assert (ended.returncode, len(launch.calls("salt"))) == (code, starts), ended.stderr


def test_there_is_a_pause_before_a_start(launch: Any) -> None:
    launch.stand_in("sleep")
    launch.reply(salt_home=[75, 1, 0])
    assert launch("gpu.sh", "--poll-seconds=7", *launch.train).returncode == 0
    assert launch.calls("sleep") == [["7"]] * 2
    assert launch.order("salt", "sleep") == ["salt", "sleep"] * 2 + ["salt"]


def test_a_request_to_stop_reaches_salt_and_is_not_answered_by_a_start(launch: Any) -> None:
    launch.reply(salt_home=["waits", 0])
    started = launch.start("gpu.sh", *FLAGS, *launch.train)
    assert any("salt waits" in line for line in iter(started.stdout.readline, ""))
    os.kill(started.pid, signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 75, said
    assert len(launch.calls("salt")) == 1
