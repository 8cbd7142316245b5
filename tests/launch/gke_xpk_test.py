"""launch/gke_xpk.sh against a stand-in for xpk; its command is run as xpk's template runs it."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
from typing import Any

import pytest

FLAGS = [
    "--cluster=pod",
    "--workload=nano",
    "--tpu-type=v6e-256",
    "--image=docker.pkg.dev/p/r/salt:1",
]
# The text that xpk gives to `bash -c` in the container, and how it asks for the end.
TEMPLATE = """
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
({command}) & PID=$!;
while kill -0 $PID 2>/dev/null; do sleep 0.1; done;
wait $PID;
exit $?
"""


def created(launch: Any) -> list[str]:
    [words] = [words for words in launch.calls("xpk") if words[1] == "create"]
    return [str(word) for word in words]


def kubernetes(text: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a container's command: $(NAME) is replaced, $$ is $."""

    def replaced(match: re.Match[str]) -> str:
        name = match.group(1)
        return "$" if name is None else environment.get(name, match.group())

    return re.sub(r"\$(?:\$|\((\w+)\))", replaced, text)


def container(launch: Any) -> "subprocess.Popen[str]":
    """Starts what xpk was told to run, in a container where HOSTNAME is set."""
    [command] = [w.partition("=")[2] for w in created(launch) if w.startswith("--command=")]
    assert "\n" not in command, "it would end the block of YAML that it is put into"
    programs = pathlib.Path(launch.folder / "image")
    programs.mkdir()
    shutil.copy(launch.folder / "bin/python3", programs / "salt")
    environment = {**launch.environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    text = kubernetes(TEMPLATE.format(command=command), {"HOSTNAME": "pod-0"})
    return subprocess.Popen(
        ["bash", "-c", text], env=environment, stdout=subprocess.PIPE, text=True, cwd=launch.folder
    )


def test_the_workload(launch: Any) -> None:
    ended = launch(
        "gke_xpk.sh", *FLAGS, "--slices=2", "--zone=us-east5-b", "--project=p",
        "--extra=--storage=texts", "--max-restarts=7", *launch.train,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    words = created(launch)
    assert words[:2] == ["workload", "create"]
    assert set(words[2:]) == {
        "--cluster=pod",
        "--project=p",
        "--zone=us-east5-b",
        "--workload=nano",
        "--tpu-type=v6e-256",
        "--num-slices=2",
        "--docker-image=docker.pkg.dev/p/r/salt:1",
        "--restart-on-exit-codes=75",
        "--max-restarts=7",
        "--termination-grace-period-seconds=120",
        "--storage=texts",
        "--command=exec salt train --output_dir=/mnt/b/run --multi_process=True",
    }
    place = ["--cluster=pod", "--project=p", "--zone=us-east5-b"]
    assert launch.calls("xpk")[1:] == [
        ["workload", "list", *place, "--wait-for-job-completion=nano"]
    ]
    assert f"xpk workload delete {' '.join(place)} --workload=nano" in ended.stderr
    assert not launch.calls("docker")


def test_words_arrive_as_they_are(launch: Any) -> None:
    assert launch("gke_xpk.sh", *FLAGS, "--detach", "--", "train", *launch.awkward).returncode == 0
    assert len(launch.calls("xpk")) == 1, "--detach waits for nothing"
    assert "--max-restarts=100" in created(launch), "what bounds it is never left to xpk"
    run = container(launch)
    assert run.wait(60) == 0
    assert launch.calls("salt") == [["train", *launch.awkward, "--multi_process=True"]]


def test_a_request_to_stop_reaches_salt(launch: Any) -> None:
    launch.reply(salt_home=["waits"])
    assert launch("gke_xpk.sh", *FLAGS, *launch.train).returncode == 0
    run = container(launch)
    assert run.stdout
    assert any("salt waits" in line for line in iter(run.stdout.readline, ""))
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 75


@pytest.mark.parametrize(("replies", "calls"), [([3], 1), ([0, 125], 2)])
def test_the_exit_code_is_that_of_xpk(launch: Any, replies: list[int], calls: int) -> None:
    launch.reply(xpk=replies)
    assert launch("gke_xpk.sh", *FLAGS, *launch.train).returncode == replies[-1]
    assert len(launch.calls("xpk")) == calls


def test_the_container_is_made_of_the_last_commit(launch: Any) -> None:
    assert launch("gke_xpk.sh", *FLAGS, "--build", *launch.train).returncode == 0
    build, push = launch.calls("docker")
    assert build[0] == "build"
    assert {"--file=launch/Dockerfile", "--build-arg=JAX=tpu", f"--tag={FLAGS[3][8:]}"} < set(build)
    assert push == ["push", FLAGS[3][8:]]
    names = [line["name"] for line in launch.log()]
    assert names == ["docker", "docker", "xpk", "xpk"]


def test_a_dry_run_runs_nothing(launch: Any) -> None:
    shown = launch("gke_xpk.sh", *FLAGS, "--build", "--dry-run", "--", "train", *launch.awkward)
    assert shown.returncode == 0, shown.stderr
    assert launch.log() == []
    ran = launch("gke_xpk.sh", *FLAGS, "--build", "--", "train", *launch.awkward)
    assert ["$ " + line for line in shown.stdout.splitlines()] == ran.stdout.splitlines()
