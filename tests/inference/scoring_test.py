"""`salt score` as real processes: killed at random, several at once, on a disk that is full."""

import contextlib
import json
import os
import pathlib
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores
from salt_jax.errors import InputError
from salt_jax.main import main
from tests.bucket_emulator import BucketEmulator

KILLS = 10
SHARDS, SHARD_ROWS = 91, 8
ROWS = (SHARDS - 1) * SHARD_ROWS + 3

# Reads commands, and runs each in a process forked from one that has imported everything, which
# takes longer than all else.
SERVER = """
import json, os, sys
import salt_jax.commands.score
from salt_jax.main import main
from tests.bucket_emulator import BucketEmulator
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitpid(request["wait"], 0)[1], flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(request["argv"])
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
"""

ENTROPY = """
from __gin__ import dynamic_registration
from salt_jax.commands import score
from salt_jax.distill import scores
score.score.scores = [@scores.Mean()]
scores.Mean.value = 'entropy'
"""


class Commands:
    """Real `salt` processes."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._log = folder / "log"

    def start(self, argv: Sequence[str]) -> int:
        """Starts one; gives its process id."""
        return int(self._ask({"argv": list(argv), "log": str(self._log)}))

    def wait(self, pid: int) -> int:
        """Its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self._ask({"wait": pid})))

    def run(self, argv: Sequence[str]) -> None:
        assert self.wait(self.start(argv)) == 0, self.text

    @property
    def text(self) -> str:
        """What all of them have printed."""
        return self._log.read_text()

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows(make_cache: Callable[..., PackedCache]) -> PackedCache:
    return make_cache(rows=ROWS)


@pytest.fixture(scope="module")
def argv(
    slm: pathlib.Path, rows: PackedCache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    programs = tmp_path_factory.mktemp("programs")

    def make(output: pathlib.Path, **flags: Any) -> list[str]:
        settings = {
            "scorer": slm,
            "scorer_step": 4,
            "cache": rows.path,
            "k": "(2, 5)",
            "shard_rows": SHARD_ROWS,
            "batch_size": 4,
            "compilation_cache": programs,
            **flags,
            "output_dir": output,
        }
        return ["score", *(f"--{name}={value}" for name, value in settings.items())]

    return make


@pytest.fixture(scope="module")
def alone(
    commands: Commands, argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("alone")
    commands.run(argv(output))
    return output


def counting(folder: pathlib.Path) -> dict[str, bytes]:
    """Everything that counts of finished scores."""
    names = ["manifest.json", "COMPLETED", "pass.json"]
    files = [*(folder / name for name in names), *(folder / "shards").glob("*.npy")]
    return {file.name: file.read_bytes() for file in files}


def finished(folder: pathlib.Path) -> int:
    return len(list((folder / "shards").glob("*.json")))


def wait_until(happened: Callable[[], bool], pid: int) -> None:
    """Until then, or until the process has ended."""
    ended = os.pidfd_open(pid)
    try:
        while not happened() and not select.select([ended], [], [], 0.002)[0]:
            pass
    finally:
        os.close(ended)


def test_killed_ten_times_at_random_it_ends_with_the_same_bytes(
    commands: Commands,
    argv: Callable[..., list[str]],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    rng = random.Random()
    kills = []
    for _ in range(KILLS):
        before = finished(tmp_path)
        # A moment from the start on, or some shards and a little later; never so late that the run
        # could end first.
        more, moment = rng.choice([(0, rng.random()), (rng.randrange(5), 0.02 * rng.random())])
        pid = commands.start(argv(tmp_path))
        wait_until(lambda goal=before + more: finished(tmp_path) >= goal, pid)  # type: ignore[misc]
        end = time.monotonic() + moment
        wait_until(
            lambda goal=before + 5, end=end: (  # type: ignore[misc]
                finished(tmp_path) >= goal or time.monotonic() > end
            ),
            pid,
        )
        os.kill(pid, signal.SIGKILL)
        assert commands.wait(pid) == -signal.SIGKILL, commands.text
        kills.append((more, moment, finished(tmp_path)))
        with pytest.raises(InputError, match=r"interrupted|half-written|does not exist"):
            RowScores.open(tmp_path)
    left = finished(tmp_path)
    assert left < finished(alone), kills
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "shards").glob("*.json")}
    commands.run(argv(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps, "scored twice"
    assert counting(tmp_path) == counting(alone), kills
    assert [file for file in tmp_path.rglob("*.tmp") if file.parent.name == "shards"] == []
    assert RowScores.open(tmp_path).rows == ROWS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_ends_with_75_and_goes_on(
    commands: Commands,
    argv: Callable[..., list[str]],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
    number: signal.Signals,
) -> None:
    """As the installed command is started, with what it does about signals."""
    process = subprocess.Popen(
        [sys.executable, "-m", "salt_jax", *argv(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: finished(tmp_path) > 1, process.pid)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert f"salt: stopped by {number.name}: run the same command again.\n" in error
    assert 1 < finished(tmp_path) < SHARDS
    commands.run(argv(tmp_path))
    assert counting(tmp_path) == counting(alone)


def test_two_workers_and_then_one_that_finishes_what_a_third_had_to(
    commands: Commands,
    argv: Callable[..., list[str]],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    pids = [commands.start(argv(tmp_path, worker=i, workers=3)) for i in (0, 2)]
    assert [commands.wait(pid) for pid in pids] == [0, 0], commands.text
    made = sorted(int(file.name[:5]) for file in (tmp_path / "shards").glob("*.json"))
    assert made == [index for index in range(SHARDS) if index % 3 != 1]
    assert not (tmp_path / "COMPLETED").exists()
    assert "30 are still missing" in commands.text
    # Both find everything finished at about the same time.
    pids = [commands.start(argv(tmp_path, worker=i, workers=2)) for i in (0, 1)]
    assert [commands.wait(pid) for pid in pids] == [0, 0], commands.text
    assert counting(tmp_path) == counting(alone)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (tmp_path, alone)]
    assert summaries[0]["columns"] == summaries[1]["columns"]
    assert {*summaries[0]["columns"]} >= {"median_drop_k2", "median_zero_k5", "log_perplexity"}


DISTRIBUTED = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from salt_jax.main import main
from tests.bucket_emulator import BucketEmulator
sys.exit(main(sys.argv[3:]))
"""


def test_hosts_that_know_of_each_other_share_a_pass(
    argv: Callable[..., list[str]], alone: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Each on a mesh of its own two devices, and again when one host alone has something left."""
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        hosts = [
            subprocess.Popen(
                [sys.executable, "-c", DISTRIBUTED, port, str(host), *argv(tmp_path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for host in (0, 1)
        ]
        try:
            texts = [host.communicate(timeout=200)[0] for host in hosts]
        finally:  # one that waits for the other for ever
            for host in hosts:
                host.kill()
        assert [host.returncode for host in hosts] == [0, 0], texts
        assert (
            json.loads((tmp_path / "shards" / "00003-of-00091.json").read_text())["measured"][
                "workers"
            ]
            == 2
        )
        first, second = RowScores.open(tmp_path), RowScores.open(alone)
        for name in ("median_drop_k2", "learnable_k5"):
            values = first.column(name)[:]
            np.testing.assert_allclose(values, second.column(name)[:], rtol=1e-5)
        (tmp_path / "shards" / "00003-of-00091.npy").unlink()


def test_finished_scores_are_left_as_they_are_and_others_refused_by_name(
    argv: Callable[..., list[str]],
    alone: pathlib.Path,
    slm: pathlib.Path,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, config = counting(alone), (alone / "config.gin").read_text()
    (tmp_path / "entropy.gin").write_text(ENTROPY)
    (tmp_path / "trimmed.gin").write_text(
        ENTROPY.replace("Mean.value = 'entropy'", "TrimmedMean.k = 300").replace(
            "Mean()", "TrimmedMean()"
        )
    )
    (tmp_path / "twice.gin").write_text(ENTROPY.replace("]", ", @scores.Mean()]"))
    assert main(argv(alone)) == 0
    # What changes no value may change.
    how = {"shard_rows": 9, "batch_size": 2, "chunk_tokens": 64, "compilation_cache": ""}
    assert main(argv(alone, **how)) == 0
    assert "was begun with shards of 8 rows, and keeps them" in capsys.readouterr().out
    other = make_cache(seed=5, rows=ROWS)
    for flags, words in (
        ({"cache": other.path}, "was begun with the cache"),
        ({"scorer_step": 12}, "was begun with the scorer"),
        ({"k": 5}, "was begun with the k [2, 5], and now the k is [5]"),
        ({"gin_file": tmp_path / "entropy.gin"}, "now the scores is ['entropy']: go back to"),
        ({"gin_file": tmp_path / "trimmed.gin"}, "TrimmedMean.k is 300 and the vocabulary has 259"),
        ({"gin_file": tmp_path / "twice.gin"}, "Two columns have the name entropy: give each"),
        ({"gin_file": tmp_path / "entropy.gin", "soft_labels": 3}, "scores has 1 and soft_labels"),
        ({"split": "test"}, "was begun with the rows"),
        ({"worker": 1}, "worker is 1 and workers is None: set both"),
        ({"worker": 2, "workers": 2}, "worker is 2 of 2 workers, numbered from 0"),
        ({"k": "()"}, "k is an empty list"),
    ):
        assert main(argv(alone, **flags)) == 2
        assert words in capsys.readouterr().err
    assert counting(alone) == before
    assert main(argv(alone)) == 0
    assert (alone / "config.gin").read_text().splitlines()[3:] == config.splitlines()[3:]


def test_another_batch_size_goes_on(
    commands: Commands,
    argv: Callable[..., list[str]],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """After a batch that was too large for memory, say."""
    pid = commands.start(argv(tmp_path, batch_size=8))
    wait_until(lambda: finished(tmp_path) > 2, pid)
    os.kill(pid, signal.SIGKILL)
    assert commands.wait(pid) == -signal.SIGKILL
    commands.run(argv(tmp_path, batch_size=3))
    first, second = RowScores.open(tmp_path), RowScores.open(alone)
    for name in ("median_drop_k2", "log_perplexity"):
        np.testing.assert_allclose(first.column(name)[:], second.column(name)[:], rtol=1e-5)


def test_a_disk_that_fills_half_way_leaves_nothing_half_written(
    argv: Callable[..., list[str]],
    alone: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with small_disk(tmp_path, "200k") as grow:
        output = tmp_path / "out"
        assert main(argv(output)) == 2
        error = capsys.readouterr().err
        assert "o space left" in error
        assert error.count("\n") == 1
        assert 0 < finished(output) < finished(alone)
        assert not (output / "COMPLETED").exists()
        assert list(output.rglob("*.npy.*.tmp")) == []
        grow()
        assert main(argv(output)) == 0
        scores = RowScores.open(output)
        assert scores.rows == ROWS


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[Callable[[], None]]:
    """A file system in memory, and what makes it larger."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root on Linux")

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=9M", str(folder)], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_workers_share_a_folder_of_a_bucket(
    argv: Callable[..., list[str]],
    bucket: BucketEmulator,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = tmp_path / "straight"
    assert main(argv(straight)) == 0
    url, folder = "gs://bucket/scores", "bucket/scores"
    assert main(argv(url, worker=1, workers=3, scorer=tmp_path / "nowhere")) == 2
    assert not bucket.names(folder)
    for worker in (1, 0):
        assert main(argv(url, worker=worker, workers=3)) == 0
    assert "30 are still missing" in capsys.readouterr().out
    assert "COMPLETED" not in bucket.names(folder)
    # A shard whose record was not written yet, and one of which a part alone is there.
    bucket.delete(f"{folder}/shards/00000-of-00091.json")
    bucket.store(f"{folder}/shards/00001-of-00091.npy", b"half")
    bucket.changed.clear()
    bucket.asked.clear()
    assert main(argv(url)) == 0
    written = {name for kind, name in bucket.changed if name.endswith(".npy")}
    assert len(written) == 30 + 2
    assert bucket.asked["list"] < SHARDS, "shards are not looked for one by one"
    there = {pathlib.Path(name).name: bucket.objects[name] for name in bucket.objects}
    assert {name: there[name] for name in counting(straight)} == counting(straight)
    assert not [name for name in there if "lock" in name or name.endswith(".tmp")]
    assert RowScores.open(url).digest == RowScores.open(straight).digest
