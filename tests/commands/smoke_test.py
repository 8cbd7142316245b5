"""The smoke run with real parts and small sizes: every step, the summary's shape, and the refusal
to compare models that have learned nothing."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from salt_jax.commands import smoke
from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.run_folder import RunFolder

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_smoke_from_text_to_page(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for source in sorted((ROOT / "salt_jax").rglob("*.py")):
        name = "_".join(source.relative_to(ROOT).parts)
        (text / name).write_text(source.read_text())
    output = tmp_path / "out"
    arguments = [
        *("--slm_steps=6", "--scorer_step=2", "--llm_steps=6", "--n_kd=3", f"--text={text}/*.py"),
        *("--data=--gin_file=data/smoke.gin", "--data=--gin.VOCABULARY_SIZE=512"),
        f"--output_dir={output}",
    ]
    command = [sys.executable, "-m", "salt_jax", "smoke", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "doesn't beat" in result.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert [arm["arm"] for arm in summary["arms"]] == ["baseline", "rkd", "salt", "salt_ds"]
    assert [arm["distill_steps"] for arm in summary["arms"]] == [0, 6, 3, 3]
    for model in [*summary["arms"], summary["slm"]]:
        assert model["steps"] == 6
        assert 0 < model["log_perplexity"] < 10
        assert 0 <= model["next_token_accuracy"] < 1
        assert model["train_flops"] > 0
        assert model["seconds"] > 0
    assert summary["bigram_log_perplexity"] > 0
    page = (output / "report" / "index.html").read_text()
    for arm in smoke.ARMS:
        assert arm in page


def summary(bigram: float, slm: float, llm: float) -> dict[str, Any]:
    arms = [{"arm": arm, "log_perplexity": llm} for arm in smoke.ARMS]
    return {"bigram_log_perplexity": bigram, "slm": {"log_perplexity": slm}, "arms": arms}


def test_models_must_have_learned() -> None:
    smoke._require_learning(summary(3.0, 2.5, 2.0))
    with pytest.raises(RunFailed, match="doesn't beat a bigram"):
        smoke._require_learning(summary(3.0, 3.1, 2.0))
    with pytest.raises(RunFailed, match="doesn't beat the SLM"):
        smoke._require_learning(summary(3.0, 2.5, 2.6))


@pytest.mark.parametrize("steps", [{"n_kd": 0}, {"scorer_step": 0}, {"n_kd": 401}])
def test_steps_must_fit(tmp_path: pathlib.Path, steps: dict[str, int]) -> None:
    with pytest.raises(InputError, match="each must be at least 1"):
        smoke.smoke(RunFolder(tmp_path / "out", "smoke"), **steps)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_another_folder_is_not_taken_over(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match="not a folder of `salt smoke`"):
        smoke.smoke(RunFolder(tmp_path, "smoke"))
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_refused_text_leaves_the_folder_free(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="refused its input"):
        smoke.smoke(RunFolder(tmp_path / "out", "smoke"), text=f"{tmp_path}/nothing/*.md")
    assert not (tmp_path / "out").exists()
