"""Programs: a model's code and its tests in; whether it passes them out.

The code is executed, in a process of its own without this one's environment, and with no other
protection: lm-eval calls this only where a user allows code execution.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence

import datasets

_EXAMPLES = (2, 3, 4)  # the ids of MBPP's own prompt (arXiv 2108.07732)
_SECONDS = 3.0  # as in Hugging Face's code_eval


def pass_at_1(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The share of programs that run through their tests, a text each, within three seconds."""
    passed = [
        _runs(f"{program}\n{tests}\n")
        for program, tests in zip(predictions, references, strict=True)
    ]
    return sum(passed) / len(passed)


def examples(rows: datasets.Dataset) -> datasets.Dataset:
    """Those rows of the split `prompt` that are shown before a task."""
    return rows.filter(lambda row: row["task_id"] in _EXAMPLES)


def _runs(program: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            finished = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return finished.returncode == 0
