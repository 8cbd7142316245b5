"""stdout and stderr never fail, whatever became of them, and a file is never taken for one."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main
from salt_jax.preparation.local_runner import run_locally
from salt_jax.terminal import ProgressBar
from tests.broken_streams import broken, print_much

SCRIPT = """
import os, subprocess, sys
from salt_jax.runtime import output_streams
output_streams.install()
with open(sys.argv[1], "w", encoding="utf-8") as file:
    for number in range(3):
        print("\\xe9\\u2192" * 10_000, flush=True)
        print("\\xe9\\u2192" * 10_000, file=sys.stderr)
        os.system("echo of a child; echo of a child >&2")
    print("left for the end", end="")
    file.write("mine alone")
"""
LOST = "salt: stdout takes nothing more ({}): further output is lost, and the command continues.\n"


def run(
    tmp_path: pathlib.Path, shell: str, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """Runs SCRIPT as $RUN in a shell, and looks at its file."""
    file = tmp_path / "file"
    result = subprocess.run(
        ["bash", "-c", f'run() {{ exec "$0" -c "$SCRIPT" {file}; }}; {shell}', sys.executable],
        env={**os.environ, "SCRIPT": SCRIPT, **(environment or {})},
        capture_output=True,
        check=False,
    )
    assert file.read_text() == "mine alone", result.stderr
    return result


@pytest.mark.parametrize(
    ("redirected", "reason"),
    [
        ("> >(exec true)", "Broken pipe"),
        (">&-", "Bad file descriptor"),
        ("> /dev/full", "No space left on device"),
    ],
)
def test_stdout_is_lost_and_told_of_once(
    tmp_path: pathlib.Path, redirected: str, reason: str
) -> None:
    result = run(tmp_path, f"(run {redirected})")
    assert result.returncode == 0, result.stderr
    assert result.stderr.decode().count(LOST.format(reason)) == 1
    assert result.stderr.decode().count("é→" * 10_000) == 3
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr


@pytest.mark.parametrize(
    "redirected",
    ["2> >(exec true)", "2>&-", "2> /dev/full", "0<&- 2>&-"],
)
def test_stderr_is_lost(tmp_path: pathlib.Path, redirected: str) -> None:
    result = run(tmp_path, f"(run {redirected})")
    assert result.returncode == 0
    assert result.stdout.decode().count("é→" * 10_000) == 3
    assert result.stdout.endswith(b"left for the end")


@pytest.mark.parametrize(
    "redirected",
    ["> >(exec true) 2>&1", "0<&- >&- 2>&-", "> /dev/full 2>&1", ">&- 2> >(exec true)"],
)
def test_both_are_lost(tmp_path: pathlib.Path, redirected: str) -> None:
    assert run(tmp_path, f"(run {redirected})").returncode == 0


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii"),
        ({"PYTHONUNBUFFERED": "1"}, "utf-8"),
    ],
)
def test_what_an_encoding_lacks_is_a_question_mark(
    tmp_path: pathlib.Path, environment: dict[str, str], encoding: str
) -> None:
    result = run(tmp_path, "(run)", environment)
    assert result.returncode == 0, result.stderr
    shown = ("é→" * 10_000).encode(encoding, "replace")
    assert result.stdout.count(shown) == 3
    assert result.stderr.count(shown) == 3


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path: pathlib.Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = SCRIPT.replace('os.system("', '("')
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "file")],
        stdout=writer,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    with open(reader, "rb") as taken:
        assert taken.read().decode().count("é→" * 10_000) == 3
    assert process.wait() == 0


def prepared(tmp_path: pathlib.Path) -> list[str]:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"water {n} " * 9}) + "\n" for n in range(200)))
    return [
        *("prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{text}'", "--workers=2"),
        *("--gin.VOCABULARY_SIZE=300", "--gin.SEQUENCE_LENGTH=32", "--show=2", "--shards=2"),
    ]


def told(arguments: Sequence[str], tmp_path: pathlib.Path, *lost: int, path: str = "") -> str:
    """Runs a verb with streams that are lost; what it has said on the other one."""
    said = tmp_path / "said"
    with broken(*lost, path=path, said=said):
        code = main([*arguments, f"--output_dir={tmp_path / 'out'}"])
    text = said.read_text() if said.exists() else ""
    assert code == 0, text
    assert (tmp_path / "out" / "summary.json").exists()
    return text


@pytest.mark.parametrize("lost", [(1,), (2,), (1, 2)])
def test_prepare_makes_its_cache_without_a_reader(
    tmp_path: pathlib.Path, lost: tuple[int, ...]
) -> None:
    text = told(prepared(tmp_path), tmp_path, *lost)
    assert PackedCache.open(tmp_path / "out").split_names
    assert text.count(LOST.format("Broken pipe")) == (lost == (1,))
    assert ("train row 1" in text) == (lost == (2,))


def test_worker_processes_do_without_a_reader() -> None:
    done: list[int] = []
    with broken(1, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "add", lambda bar, status: done.append(1))
        run_locally(print_much, [1, 2, 3], "jobs", 0, workers=2)
    assert len(done) == 3


def test_a_disk_that_is_full_of_output_is_not_that_of_the_results(
    tmp_path: pathlib.Path, cache: PackedCache
) -> None:
    select = ["select", f"--cache={cache.path}", "--gin_file=methods/random_rows.gin"]
    text = told([*select, "--gin.ROWS=5"], tmp_path, 1, path="/dev/full")
    assert text == LOST.format("No space left on device")
