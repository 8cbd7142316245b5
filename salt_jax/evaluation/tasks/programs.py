"""Runs the programs that a model writes against their tests, for tasks of lm-eval.

A program runs in its own process, without this one's environment and with little other protection:
its output is discarded, its memory and the files it writes are limited, and processes that it
started end with it unless they left its process group. lm-eval calls this only where a user allows
code execution.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import datasets

_EXAMPLES = (2, 3, 4)  # the ids of MBPP's own prompt (arXiv 2108.07732)
_SECONDS = 3.0  # as in Hugging Face's code_eval

# Sets limits that a program can't raise again, then runs the program on its stdin.
_LIMITED = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({4 << 30}, {4 << 30}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({16 << 20}, {16 << 20}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "-"])
"""


def pass_at_1(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The share of programs that pass their tests within three seconds."""
    passed = [
        _runs(f"{program}\n{tests}\n")
        for program, tests in zip(predictions, references, strict=True)
    ]
    return sum(passed) / len(passed)


def examples(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows of the split `prompt` that are shown before a task."""
    return rows.filter(lambda row: row["task_id"] in _EXAMPLES)


def _runs(program: str) -> bool:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED],
            cwd=folder,
            env={},
            # Not as an argument, which can hold neither a NUL byte nor 200 KB.
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(program.encode(errors="replace"), timeout=_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return child.returncode == 0
