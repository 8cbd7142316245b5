"""launch/tpu_vm.sh against a stand-in for gcloud whose workers are folders of this machine."""

import os
import pathlib
import shlex
import signal
import subprocess
from typing import Any

import pytest

FLAGS = ["--name=nano", "--zone=us-west4-b", "--accelerator-type=v5litepod-16", "--poll-seconds=0"]
TRAIN = ["--", "salt", "train", "--output_dir=/mnt/b/run"]
ONE_RUN = ["create", "scp", "install", "start", "follow"]


def test_one_run(launch: Any) -> None:
    launch.reply(states=["", "WAITING_FOR_RESOURCES", "ACTIVE"])
    ended = launch("tpu_vm.sh", *FLAGS, "--spot", "--extra=--reserved", *TRAIN)
    assert ended.returncode == 0, ended.stderr
    assert launch.gcloud() == ONE_RUN
    [create] = [words for words in launch.calls("gcloud") if words[3] == "create"]
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "nano"]
    assert set(create[5:]) == {
        "--zone=us-west4-b",
        "--node-id=nano",
        "--spot",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--reserved",
    }
    assert (
        launch.calls("salt") == [["train", "--output_dir=/mnt/b/run", "--multi_process=True"]] * 2
    )
    assert "salt runs on host0" in ended.stdout
    assert "salt runs on host1" not in ended.stdout
    assert "finished" in ended.stderr
    assert "queued-resources delete nano --zone=us-west4-b --force --quiet" in ended.stderr


def test_a_profile_is_asked_of_salt(launch: Any) -> None:
    ended = launch("tpu_vm.sh", *FLAGS, "--profile=100:105", "--dry-run", *TRAIN)
    assert "--multi_process=True --profile_steps=100:105" in ended.stdout


def test_variables_of_the_command(launch: Any) -> None:
    given = ["GIVEN=--xla_a=1 --xla_b='2 $HOME'", "GIVEN_2=", 'GIVEN_3="`id`" = $(date)\n;']
    ended = launch("tpu_vm.sh", *FLAGS, *(f"--env={each}" for each in given), *TRAIN)
    assert ended.returncode == 0, ended.stderr
    assert [sorted(each) for each in launch.calls("given")] == [sorted(given)] * 2
    assert launch.calls("salt")[0] == ["train", "--output_dir=/mnt/b/run", "--multi_process=True"]


@pytest.mark.parametrize("wrong", ["--env=NAME", "--env=2=a", "--env==a", "--env=A B=c", "--env"])
def test_what_is_no_variable(launch: Any, wrong: str) -> None:
    ended = launch("tpu_vm.sh", *FLAGS, wrong, *TRAIN)
    assert ended.returncode == 2
    assert "--env" in ended.stderr
    assert launch.log() == []


def test_logs_are_sent_to_the_bucket_of_the_output(launch: Any) -> None:
    ended = launch("tpu_vm.sh", *FLAGS, "--", "salt", "train", "--output_dir=gs://b/the run/")
    assert ended.returncode == 0, ended.stderr
    logs = sorted((launch.folder / "buckets/b/the run/logs").iterdir())
    assert [path.name.partition("-")[0] for path in logs] == ["host0", "host1"]
    assert [path.read_text() for path in logs] == ["salt runs on host0\n", "salt runs on host1\n"]
    launch("tpu_vm.sh", *FLAGS, *TRAIN)
    assert len(launch.calls("sent")) == 2, "a folder's are not sent"


def test_logs_are_sent_while_it_runs(launch: Any) -> None:
    launch.reply(salt_host0=["waits", 0])
    (launch.folder / "bash_env").write_text("export SALT_LOG_SECONDS=0.01")
    waiting_worker(launch, "--output_dir=gs://b/run")
    while len(launch.calls("sent")) < 3:
        assert call_worker(launch, "state") == "salt_worker host0 running\n"
    [log] = (launch.folder / "buckets/b/run/logs").iterdir()
    assert "salt waits" in log.read_text()


def test_what_is_installed(launch: Any) -> None:
    assert launch("tpu_vm.sh", *FLAGS, *TRAIN).returncode == 0
    pip = [words for words in launch.calls("python") if "install" in words]
    lock = launch.folder / "hosts/host0/salt_jax/requirements/lock-3.12.txt"
    assert pip[0][-2:] == [f"--requirement={lock}", "jax[tpu]"]
    assert lock.exists()
    assert len(pip) == 4, "two commands on each of two workers"


def test_a_python_is_brought_where_the_image_has_an_old_one(launch: Any) -> None:
    """Of four that are looked for none is new enough; the one that uv brings is."""
    launch.reply(python_too_old=[1, 1, 1, 1, 0] * 2)
    for host in ("host0", "host1"):
        local = launch.folder / "hosts" / host / ".local/bin"
        local.mkdir(parents=True)
        (local / "uv").symlink_to(launch.folder / "bin/uv")
    ended = launch("tpu_vm.sh", *FLAGS, *TRAIN)
    assert ended.returncode == 0, ended.stderr
    pip = ["-m", "pip", "install", "--quiet", "--user", "uv"]
    assert launch.calls("python3").count(pip) == 2
    assert launch.calls("uv").count(["python", "install", "--quiet", "3.12"]) == 2
    assert len(launch.calls("salt")) == 2


def test_a_bucket_is_mounted_once(launch: Any) -> None:
    launch.reply(mountpoint=[1, 0])
    assert launch("tpu_vm.sh", *FLAGS, "--bucket=texts", *TRAIN).returncode == 0
    assert launch.calls("mountpoint") == [["--quiet", "/mnt/texts"]] * 2
    [words] = launch.calls("gcsfuse")
    assert words[-2:] == ["texts", "/mnt/texts"]
    assert "--metadata-cache-ttl-secs=0" in words


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-256", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_several_slices(launch: Any, kind: str, image: str) -> None:
    flags = [*FLAGS, f"--accelerator-type={kind}", "--slices=2", "--dry-run"]
    [create] = [
        x for x in launch("tpu_vm.sh", *flags, *TRAIN).stdout.splitlines() if " create " in x
    ]
    words = shlex.split(create)
    assert {"--node-count=2", "--node-prefix=nano", f"--runtime-version={image}"} <= {*words}
    assert not [word for word in words if word.startswith("--node-id")]


def test_words_arrive_as_they_are(launch: Any) -> None:
    assert launch("tpu_vm.sh", *FLAGS, "--", "train", *launch.awkward).returncode == 0
    assert launch.calls("salt") == [["train", *launch.awkward, "--multi_process=True"]] * 2


def test_interrupted_runs_are_started_again(launch: Any) -> None:
    launch.reply(states=["", "ACTIVE"], salt_host0=[75, 75, 0], salt_host1=[75, 75, 0])
    launch.each_run_takes(600)
    ended = launch("tpu_vm.sh", *FLAGS, "--max-failures=0", *TRAIN)
    assert ended.returncode == 0, ended.stderr
    assert launch.gcloud() == [*ONE_RUN, "start", "follow", "start", "follow"]
    assert ended.stdout.count("salt runs on host0") == 3
    assert len({*map(tuple, launch.calls("salt"))}) == 1


def test_what_interrupts_every_start_ends_it(launch: Any) -> None:
    launch.reply(states=["ACTIVE"], salt_host0=[75, 75, 75, 75, 0], salt_host1=[75, 75, 75, 75, 0])
    ended = launch("tpu_vm.sh", *FLAGS, *TRAIN)
    assert ended.returncode == 1
    assert len(launch.calls("salt")) == 4 * 2
    assert "before --min-run-seconds=600, failure 4 in a row, more than --max-fai" in ended.stderr


def test_there_is_a_pause_before_a_start_on_the_same_machine(launch: Any) -> None:
    launch.stand_in("sleep")
    launch.reply(states=["ACTIVE"], salt_host0=[75, 0], salt_host1=[1, 0])
    assert launch("tpu_vm.sh", *FLAGS, "--poll-seconds=7", *TRAIN).returncode == 0
    assert launch.calls("sleep") == [["7"]]
    assert launch.order("salt", "sleep") == ["salt", "salt", "sleep", "salt", "salt"]


def test_an_ending_counts_once_though_the_next_start_finds_no_connection(launch: Any) -> None:
    # They answer to: state, install, start, follow, state; start does not; then the same again.
    launch.reply(states=["ACTIVE"], ssh=[0, 0, 0, 0, 0, 255, 0], salt_host0=[1, 0])
    ended = launch("tpu_vm.sh", *FLAGS, "--max-failures=1", *TRAIN)
    assert ended.returncode == 0, ended.stderr
    again = ["start", "install", "start", "follow"]
    assert [verb for verb in launch.gcloud() if verb != "scp"] == [*ONE_RUN[2:], *again]
    assert ended.stderr.count("failure 1 of the 1") == 1


def test_refused_input_is_not_started_again(launch: Any) -> None:
    launch.reply(salt_host0=[75, 0], salt_host1=[2, 0])
    ended = launch("tpu_vm.sh", *FLAGS, *TRAIN)
    assert ended.returncode == 2
    assert len(launch.calls("salt")) == 2
    assert "refused its input (exit code 2)" in ended.stderr


def test_a_failure_counts_though_the_others_saved(launch: Any) -> None:
    launch.reply(salt_host0=[75], salt_host1=[1])
    ended = launch("tpu_vm.sh", *FLAGS, "--max-failures=1", *TRAIN)
    assert ended.returncode == 1
    assert len(launch.calls("salt")) == 4
    assert "more than --max-failures=1" in ended.stderr


def test_a_tpu_taken_away_is_asked_for_again(launch: Any) -> None:
    launch.reply(
        states=["", "ACTIVE", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"],
        salt_host0=[75, 0],
        salt_host1=[75, 0],
    )
    ended = launch("tpu_vm.sh", *FLAGS, *TRAIN)
    assert ended.returncode == 0, ended.stderr
    assert launch.gcloud() == [*ONE_RUN, "delete", *ONE_RUN]
    assert launch.calls("salt") == launch.calls("salt")[:1] * 4


def test_giving_up_on_a_tpu_taken_away_too_often(launch: Any) -> None:
    launch.reply(states=["", "SUSPENDED", "FAILED", "SUSPENDED"])
    ended = launch("tpu_vm.sh", *FLAGS, "--max-recreations=2", *TRAIN)
    assert ended.returncode == 1
    assert launch.gcloud() == ["create", "delete", "create", "delete", "create"]
    assert "--max-recreations" in ended.stderr


def test_a_tpu_deleted_by_hand_is_not_asked_for_again(launch: Any) -> None:
    launch.reply(states=["ACTIVE", ""])
    ended = launch("tpu_vm.sh", *FLAGS, "--delete-at-end", *TRAIN)
    assert ended.returncode == 1
    assert "create" not in launch.gcloud()
    assert "delete" not in launch.gcloud()


def test_workers_that_do_not_answer_are_asked_again(launch: Any) -> None:
    # They answer to: state, install, start, follow.
    launch.reply(ssh=[255, 0, 255, 0, 0, 0, 0, 255, 0])
    ended = launch("tpu_vm.sh", *FLAGS, *TRAIN)
    assert ended.returncode == 0, ended.stderr
    assert "not all workers" in ended.stderr
    assert "could not be set up" in ended.stderr
    assert len(launch.calls("salt")) == 2


def test_deleted_at_the_end_however_it_ends(launch: Any) -> None:
    launch.reply(salt_host0=[2])
    ended = launch("tpu_vm.sh", *FLAGS, "--delete-at-end", *TRAIN)
    assert ended.returncode == 2
    assert launch.gcloud()[-1] == "delete"
    assert launch.calls("gcloud")[-1][3:] == ["delete", "nano", FLAGS[1], "--force", "--quiet"]


def test_ctrl_c_leaves_the_run_and_the_script_finds_it_again(launch: Any) -> None:
    launch.reply(states=["", "ACTIVE"], salt_host0=["waits", 0], salt_host1=["waits", 0])
    first = launch.start("tpu_vm.sh", *FLAGS, *TRAIN)
    assert first.stdout
    assert any("salt waits" in line for line in iter(first.stdout.readline, ""))
    os.killpg(first.pid, signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "queued-resources delete nano" in said
    assert "delete" not in launch.gcloud()

    second = launch.start("tpu_vm.sh", *FLAGS, *TRAIN)
    assert second.stdout
    assert any("salt waits" in line for line in iter(second.stdout.readline, ""))
    assert len(launch.calls("salt")) == 2, "it is followed, not started once more"
    for file in launch.folder.glob("hosts/*/salt_worker/pid"):
        pid = int(file.read_text())
        assert os.getpgid(pid) == pid, "what ends a connection and all it started leaves it"
        os.kill(pid, signal.SIGTERM)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "runs a command already" in said
    assert len(launch.calls("salt")) == 4, "both ended with 75 and were started again"


def test_a_start_ends_what_an_earlier_one_left(launch: Any) -> None:
    """One worker's process hangs when the machine was set up anew on the other."""
    launch.reply(salt_host0=["waits", 0])
    launch.each_run_takes(12)
    assert launch("worker.sh", "state").stdout == "salt_worker home idle\n"
    salt = waiting_worker(launch)
    call_worker(launch, "start", salt, "train")
    assert len(launch.calls("saved")) == 1
    call_worker(launch, "follow", "+1")
    assert call_worker(launch, "state") == "salt_worker host0 ended 0 12\n"
    assert len(launch.calls("salt")) == 2


def test_a_worker_that_was_killed_has_no_time(launch: Any) -> None:
    launch.reply(salt_host0=["waits"])
    waiting_worker(launch)
    os.killpg(int((launch.folder / "hosts/host0/salt_worker/pid").read_text()), signal.SIGKILL)
    while (state := call_worker(launch, "state")) == "salt_worker host0 running\n":
        pass
    assert state == "salt_worker host0 ended 137 0\n"


def call_worker(launch: Any, *words: str) -> str:
    """Runs worker.sh on the first host; returns what it printed."""
    environment = {**launch.environment, "HOME": str(launch.folder / "hosts/host0")}
    command = [launch.clone / "launch/worker.sh", *words]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def waiting_worker(launch: Any, *flags: str) -> str:
    """Starts `salt` there, until it can be asked to end; returns its path."""
    make = [launch.folder / "bin/python3", "-m", "venv", launch.folder / "venv"]
    subprocess.run(make, env=launch.environment, check=True)
    salt = str(launch.folder / "venv/bin/salt")
    call_worker(launch, "start", salt, "train", *flags)
    while not launch.calls("waits"):
        assert call_worker(launch, "state") == "salt_worker host0 running\n"
    return salt


def test_a_dry_run_runs_nothing(launch: Any) -> None:
    shown = launch(
        "tpu_vm.sh", *FLAGS, "--delete-at-end", "--dry-run", "--", "salt", "train", *launch.awkward
    )
    assert shown.returncode == 0, shown.stderr
    assert launch.log() == []
    assert not list(launch.folder.glob("*.tar.gz"))
    assert launch.calls("gcloud") == []
    # What it shows is what it runs.
    launch.reply(states=["", "ACTIVE"])
    ran = launch("tpu_vm.sh", *FLAGS, "--delete-at-end", "--", "salt", "train", *launch.awkward)
    verbs = [shlex.split(line[2:]) for line in ran.stdout.splitlines() if line.startswith("$ ")]
    looks = [x for x in map(shlex.split, shown.stdout.splitlines()) if "state;" not in x[-1]]
    assert verbs == looks
    assert verbs[-1][4] == "delete"


def test_the_commit_is_the_one_of_the_start(launch: Any, tmp_path: pathlib.Path) -> None:
    shown = launch("tpu_vm.sh", *FLAGS, "--dry-run", *TRAIN)
    [archive] = [line for line in shown.stdout.splitlines() if line.startswith("git ")]
    commit = (launch.clone / ".git/HEAD").read_text().split()[-1]
    assert archive.split()[-1] == (launch.clone / ".git" / commit).read_text().strip()
    assert "not committed" not in shown.stderr
    (launch.clone / "notes").write_text("x")
    try:
        changed = launch("tpu_vm.sh", *FLAGS, "--dry-run", *TRAIN)
    finally:
        (launch.clone / "notes").unlink()
    assert "changes that are not committed" in changed.stderr
