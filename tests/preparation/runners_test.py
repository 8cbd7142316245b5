"""Who does the jobs: bad settings in a sentence, and processes that end when they are asked to."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from salt_jax.errors import InputError
from salt_jax.preparation import runners
from salt_jax.preparation.runners import JobRunner

BAD = {
    "unknown": ({"runner": "FlinkRuner"}, "runner is 'FlinkRuner'.*nearest: FlinkRunner"),
    "workers": ({"workers": 0}, "workers is 0 and must be at least 1: change --workers"),
    "options": ({"beam_options": ("--a=b",)}, "beam_options are given, but runner is 'local'"),
    "both": (
        {"runner": "SparkRunner", "workers": 2},
        "Beam's workers in beam_options",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_settings_are_one_sentence(what):
    settings, words = BAD[what]
    with pytest.raises(InputError, match=words) as caught:
        JobRunner(**settings)
    assert "\n" not in str(caught.value)


def test_beam_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(runners.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Beam is not installed: pip install 'salt_jax\[beam\]'"):
        JobRunner("DataflowRunner")


WORKING = """
import os, pathlib, signal, sys, time
from salt_jax.__main__ import _stop
from salt_jax.main import main

def job(number):
    (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch()
    os.write(1, b"working\\n")
    time.sleep(600)

if __name__ == "__main__":
    from salt_jax.preparation.local_runner import run_locally
    from salt_jax.errors import Interrupted
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        run_locally(job, [1, 2, 3], "jobs", 0, 2)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
    (tmp_path / "run.py").write_text(WORKING)
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "pids")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for _ in range(2):
            assert process.stdout.readline() == "working\n"
        pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
        assert len(pids) == 2
        assert process.pid not in pids
        # Ctrl-C reaches every process of the terminal, and so does its end.
        of_all = number in (signal.SIGINT, signal.SIGHUP)
        (os.killpg if of_all else os.kill)(process.pid, number)
        error = process.communicate(timeout=60)[1]  # ends when the last process has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        name = signal.Signals(number).name
        assert error == f"stopped by {name}: run the same command again to resume.\n"
