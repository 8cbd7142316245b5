"""A token that was added to a tokenizer and has no row in the model's embedding."""

import pathlib
from collections.abc import Callable

import pytest

from salt_jax.main import main


def test_the_message_names_the_token(
    case: Callable[[str], pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = case("token_beyond_embedding")
    out = folder / "out"
    assert main(["convert", f"--huggingface={folder / 'small'}", f"--output_dir={out}"]) == 2
    said = capsys.readouterr().err
    assert "has an added token ('<extra_0>') beyond the 356 rows of the model's embedding" in said
    assert "resize_token_embeddings(357)" in said
    assert "download" not in said
    assert not out.exists()
