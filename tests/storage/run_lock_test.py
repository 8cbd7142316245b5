"""Two processes and one output folder: the second one is kept out, and let in after the first."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.storage.run_folder import RunFolder
from salt_jax.storage.run_lock import RunLock

# Begins a run, says so, and goes on until its input is closed or it is killed.
HOLDER = """
import pathlib, sys
from salt_jax.storage.run_folder import RunFolder
from salt_jax.storage.run_lock import RunLock
with RunLock() as lock:
    RunFolder(pathlib.Path(sys.argv[1]), "prepare", lock=lock).begin(part=sys.argv[2])
    print("begun", flush=True)
    sys.stdin.read()
"""


def start(folder: pathlib.Path, part: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), part],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def begin(folder: pathlib.Path, part: str = "") -> None:
    with RunLock() as lock:
        RunFolder(folder, "prepare", lock=lock).begin(part=part)


@pytest.mark.parametrize("killed", [True, False])
def test_the_second_is_kept_out_until_the_first_has_ended(
    tmp_path: pathlib.Path, killed: bool
) -> None:
    process = start(tmp_path / "out")
    where = f"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(InputError, match=rf"by another `salt prepare` \({where}\): wait"):
        begin(tmp_path / "out")
    if killed:
        process.kill()
    process.communicate()
    begin(tmp_path / "out")
    begin(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.gin", "run.json"]


def test_a_command_that_is_kept_out_writes_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, text = tmp_path / "out", tmp_path / "a.txt"
    text.write_text("\n".join(f"line {number} of some" for number in range(999)))
    process = start(output)
    before = (output / "run.json").read_bytes()
    command = ["prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{text}'"]
    command += ["--gin.VOCABULARY_SIZE=300", "--workers=1"]
    assert main([*command, f"--output_dir={output}"]) == 2
    assert f"(process {process.pid} on " in capsys.readouterr().err
    assert (output / "run.json").read_bytes() == before
    process.communicate()
    assert json.loads(before)["verb"] == "prepare"


def test_workers_share_a_folder_but_not_their_part(tmp_path: pathlib.Path) -> None:
    process = start(tmp_path, part="0-of-2")
    begin(tmp_path, part="1-of-2")
    with pytest.raises(InputError, match="is being written by another"):
        begin(tmp_path, part="0-of-2")
    process.communicate()
    begin(tmp_path, part="0-of-2")


def test_a_run_that_is_withdrawn_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with RunLock() as lock:
        run = RunFolder(tmp_path / "out", "prepare", lock=lock)
        run.begin()
        run.begin()
        run.withdraw()
        assert not (tmp_path / "out").exists()


def test_a_run_that_is_resumed_is_locked_before_it_begins(tmp_path: pathlib.Path) -> None:
    """Models are loaded in between."""

    def resume(name: str, config: str = "", part: str = "") -> list[str]:
        with RunLock() as lock:
            run = RunFolder(tmp_path / name, "prepare", config=lambda: config, lock=lock)
            run.resume(part=part)
            if (tmp_path / name).exists():
                assert lock.is_held
                run.begin(part=part)
        return sorted(os.listdir(tmp_path))

    assert resume("new") == [], "nothing is written"
    process = start(tmp_path / "out")
    with pytest.raises(InputError, match="is being written by another"):
        resume("out")
    process.communicate()
    resume("out")
    with pytest.raises(InputError, match=r"seed was unset and is now 3; choose another"):
        resume("out", "prepare.prepare.seed = 3")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.gin", "run.json"]
