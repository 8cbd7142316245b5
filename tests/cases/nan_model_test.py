"""A model with a NaN in one weight, whose every prediction counted as right."""

import pathlib
from collections.abc import Callable

import pytest

from salt_jax.main import main


def test_it_has_no_accuracy(
    case: Callable[[str], pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(case("nan_model"))
    refused = main(["convert", "--huggingface=nan", "--output_dir=run"])
    if not refused:
        assert main(["prepare", "--gin_file=tc.gin", "--output_dir=cache"]) == 0
        asked = ["--compilation_cache=", "--model=run", "--cache=cache", "--output_dir=ev"]
        refused = main(["evaluate", *asked])
    assert refused == 2
    assert "not finite" in capsys.readouterr().err
    assert not pathlib.Path("ev/summary.json").exists()
