"""The notebook's cells, run in order as a person would, with a few steps."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples/salt_in_ten_minutes.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: pathlib.Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    text = f"{ROOT}/salt_jax/**/*.py"
    sizes = {"SLM_STEPS": "8", "LLM_STEPS": "8", "SALT_TEXT": text, "MPLBACKEND": "agg"}
    environment = {**os.environ, **sizes}
    result = subprocess.run(
        [sys.executable, "-P", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    out = tmp_path / "out/ten_minutes"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report/index.html").exists()
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
