"""The files of docs/extending.md work as they stand there, outside the package."""

import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from salt_jax.cli.command_line import SAFE_GIN
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.main import main

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
TRAIN = (
    *("train", "--gin_file=runs/pretrain.gin", "--gin_file=models/llm_smoke.gin"),
    *("--steps=2", "--batch_size=8", "--log_every=1", "--compilation_cache="),
    *(
        "--gin.LEARNING_RATE=1e-3",
        "--gin.WARMUP_STEPS=1",
        "--gin.decoder.DecoderConfig.num_layers=1",
    ),
)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The current folder, with the page's files; Python finds modules there."""
    blocks = re.findall(r"^`([\w.]+)`:\n\n((?: {4}.*\n|\n)+)", PAGE.read_text(), re.M)
    for name, text in blocks:
        (tmp_path / name).write_text(textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(SAFE_GIN, "")
    return tmp_path


@pytest.fixture
def refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Checks that --safe_gin refuses a command for the module that a gin file imports."""

    def check(*typed: str, module: str) -> None:
        assert main([*typed, "--safe_gin", "--output_dir=refused"]) == 2
        monkeypatch.setenv(SAFE_GIN, "")
        assert f"--safe_gin keeps gin from importing {module}" in capsys.readouterr().err
        assert not pathlib.Path("refused").exists()

    return check


@pytest.fixture
def slm(folder: pathlib.Path, cache: PackedCache) -> pathlib.Path:
    slm = [*TRAIN, f"--cache={cache.path}", "--gin_file=methods/baseline.gin"]
    assert main([*slm, "--output_dir=slm"]) == 0
    return folder / "slm"


def test_a_divergence(
    folder: pathlib.Path, slm: pathlib.Path, cache: PackedCache, refuse: Callable[..., None]
) -> None:
    salt = [*TRAIN, f"--cache={cache.path}", "--gin_file=methods/salt.gin"]
    salt += ["--gin.N_KD=1", f"--teacher={slm}"]
    own = [*salt, "--gin_file=my_divergence.gin"]
    refuse(*own, module="my_divergences")
    assert main([*salt, "--output_dir=salt"]) == 0
    assert main([*own, "--output_dir=own"]) == 0
    soft = {}
    for run in ("salt", "own"):
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        soft[run] = next(
            line["soft_loss"] for line in map(json.loads, lines) if "soft_loss" in line
        )
    assert 0 < soft["own"] < soft["salt"]  # a KL, and a cross-entropy


def test_a_gate(
    folder: pathlib.Path, slm: pathlib.Path, cache: PackedCache, refuse: Callable[..., None]
) -> None:
    own = [*TRAIN, f"--cache={cache.path}", "--gin_file=methods/salt.gin", "--gin.N_KD=1"]
    own += [f"--teacher={slm}", "--gin_file=my_gate.gin"]
    refuse(*own, module="my_gates")
    assert main([*own, "--output_dir=own"]) == 0
    line = json.loads((folder / "own" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["gate"] < 1
    omega, hard = line["omega"] * line["gate"], line["log_perplexity"]
    assert abs(line["loss"] - hard) < abs(omega * (line["soft_loss"] - hard)) * 1.5


def test_a_score(
    folder: pathlib.Path, slm: pathlib.Path, cache: PackedCache, refuse: Callable[..., None]
) -> None:
    """From `salt score` to `salt train`, beside the median as one's own."""
    score = ["score", f"--scorer={slm}", f"--cache={cache.path}", "--compilation_cache="]
    own = [*score, "--gin_file=my_score.gin"]
    refuse(*own, module="my_scores")
    assert main([*own, "--output_dir=scores"]) == 0
    median = [*own, "--gin.my_scores.Percentile.percent=50", "--output_dir=medians"]
    assert main(median) == 0
    medians = RowScores.open("medians")
    half, seventy_five = medians.column("p50_k10")[:], RowScores.open("scores").column("p75_k10")[:]
    np.testing.assert_allclose(half, medians.column("median_drop_k10")[:], rtol=1e-6)
    assert (seventy_five > half).any()
    select = ["select", "--gin_file=methods/top_rows.gin", "--gin.ROWS=16", "--scores=scores"]
    select += [f"--cache={cache.path}", "--statistic=p75_k10", "--output_dir=selection"]
    assert main(select) == 0
    chosen = Selection.open("selection")
    assert chosen.row_ids.tolist() == sorted(np.argsort(-seventy_five, kind="stable")[:16])
    train = [*TRAIN, f"--cache={cache.path}", "--gin_file=methods/salt_ds.gin", "--gin.N_KD=1"]
    train += [f"--teacher={slm}", "--selection=selection", "--output_dir=salt_ds"]
    assert main(train) == 0
    summary = json.loads((folder / "salt_ds" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_a_family_of_models(
    folder: pathlib.Path, random_models: Any, refuse: Callable[..., None], capsys: Any
) -> None:
    model = random_models.make(folder / "theirs", "starcoder2")
    expected = random_models.their_logits(model)
    taken = ["convert", "--huggingface=theirs"]
    assert main([*taken, "--output_dir=refused"]) == 2
    assert "model_type to 'starcoder2', expected one of gpt_neox" in capsys.readouterr().err
    own = [*taken, "--gin_file=starcoder2.gin"]
    refuse(*own, module="starcoder2")
    assert main([*own, "--output_dir=run"]) == 0
    ours = random_models.our_logits(pathlib.Path("run"))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    given = ["convert", "--model=run", "--output_dir=back"]
    assert main(given) == 2
    assert "None of the families" in capsys.readouterr().err
    assert main([*given, "--gin_file=starcoder2.gin"]) == 0
    back = random_models.their_logits(folder / "back")
    np.testing.assert_allclose(back, expected, atol=1e-5, rtol=0)
