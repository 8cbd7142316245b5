"""A model with a NaN in one weight: its tensor is named when it is taken in."""

import pathlib
from collections.abc import Callable

import pytest

from salt_jax.main import main


def test_conversion_names_the_tensor(
    case: Callable[[str], pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = case("nan_model")
    flags = [f"--huggingface={source / 'nan'}", f"--output_dir={source / 'run'}"]
    assert main(["convert", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("salt: The tensor model.layers.")
    assert f" of {source / 'nan'} has values that are not finite (nan)" in error
    assert error.count("\n") == 1
    assert not (source / "run").exists()
