"""Programs that a model wrote: what they print, leave running and write is bounded."""

import os
import pathlib
import resource
import select

import pytest

from salt_jax.evaluation.tasks import programs

LOOP = "\nwhile True:\n    pass\n"


@pytest.fixture(autouse=True)
def _time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Python itself may need seconds to start."""
    monkeypatch.setattr(programs, "_SECONDS", 60.0)


def passes(program: str) -> bool:
    return programs.pass_at_1([""], [program]) == 1


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("from __future__ import annotations\nif __name__ == '__main__':\n    x = 1", True),
        ("try:\n    input()\nexcept EOFError:\n    pass", True),
        ("x = '" + "a" * 300_000 + "'", True),
        ("x = 1 +", False),
        ("x = '\0'", False),
        ("# \ud800", True),
        ("raise SystemExit(3)", False),
    ],
)
def test_programs_run_as_a_file_does(program: str, passed: bool) -> None:
    assert passes(program) == passed


def test_what_a_program_prints_is_not_kept() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert passes("for _ in range(600):\n    print('a' * 1_000_000)")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB, of 600 MB


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(5 << 30)",
        "open('a', 'wb').write(bytes(20 << 20))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(5 << 30)",
    ],
)
def test_memory_and_files_have_a_limit(program: str) -> None:
    assert not passes(program)


@pytest.mark.parametrize("ending", ["", LOOP])
def test_what_a_program_started_ends_with_it(
    ending: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends, and one that is ended."""
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    program = f"""
import os
held = os.open({str(fifo)!r}, os.O_WRONLY)
if os.fork() == 0:
    while True:
        pass
{ending}
"""
    if ending:
        monkeypatch.setattr(programs, "_SECONDS", 8.0)
    assert passes(program) == (not ending)
    # Its end is seen once no process has it open any more.
    assert select.select([held], [], [], 60.0)[0]
    assert os.read(held, 1) == b""
    os.close(held)
