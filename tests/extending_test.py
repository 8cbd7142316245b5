"""The files of docs/extending.md do what it says, through `salt train`; --safe_gin refuses them."""

import json
import pathlib
import re
import sys
import textwrap

import numpy as np
import pytest

from salt_jax.cli.command_line import SAFE_GIN
from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture
def pages_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with the page's files, in which Python looks for modules."""
    blocks = re.findall(r"^`([\w.]+)`:\n\n((?: {4}.*\n|\n)+)", PAGE.read_text(), re.M)
    for name, text in blocks:
        (tmp_path / name).write_text(textwrap.dedent(text))
        if name.endswith(".py"):
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(SAFE_GIN, "")
    return tmp_path


def command(cache: PackedCache, files: pathlib.Path, name: str) -> list[str]:
    shape = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "dtype": "'float32'"}
    return [
        *("train", "--gin_file=runs/smoke_llm.gin", "--gin_file=methods/baseline.gin"),
        *(f"--gin.decoder.DecoderConfig.{field}={value}" for field, value in shape.items()),
        *(f"--gin_file={files / name}", f"--cache={cache.path}", "--steps=4", "--batch_size=8"),
        *("--log_every=1", "--gin.WARMUP_STEPS=2", f"--output_dir={files / 'out'}"),
    ]


def metrics(files: pathlib.Path, name: str) -> np.ndarray:
    lines = (files / "out" / "metrics.jsonl").read_text().splitlines()
    return np.array([line[name] for line in map(json.loads, lines) if line["kind"] == "train"])


def test_an_optimizer(cache: PackedCache, pages_files: pathlib.Path) -> None:
    arguments = command(cache, pages_files, "lion.gin")
    assert main([*arguments, "--gin.WEIGHT_DECAY=0.0"]) == 0
    rates = metrics(pages_files, "learning_rate")
    np.testing.assert_allclose(rates[:2], [1.5e-4, 3e-4], rtol=1e-6)
    # Each parameter moves by the rate, but for the rows that pad the vocabulary from 259 to 384.
    summary = json.loads((pages_files / "out" / "summary.json").read_text())
    moved = rates * (summary["parameters"] - (384 - 259) * 16) ** 0.5
    np.testing.assert_allclose(metrics(pages_files, "update_norm"), moved, rtol=1e-5)
    assert "lion.Lion.weight_decay = %WEIGHT_DECAY" in (pages_files / "out/config.gin").read_text()


def test_a_learning_rate(cache: PackedCache, pages_files: pathlib.Path) -> None:
    assert main([*command(cache, pages_files, "halving.gin"), "--gin.LEARNING_RATE=0.01"]) == 0
    expected = [0.01, 0.01, 0.005, 0.005]
    np.testing.assert_allclose(metrics(pages_files, "learning_rate"), expected, rtol=1e-6)


@pytest.mark.parametrize("module", ["lion", "halving"])
def test_safe_gin_refuses_them(
    module: str, cache: PackedCache, pages_files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(cache, pages_files, f"{module}.gin"), "--safe_gin"]) == 2
    assert f"--safe_gin keeps gin from importing {module}," in capsys.readouterr().err
    assert module not in sys.modules
