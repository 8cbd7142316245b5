"""A user whom the system doesn't know, without HOME: a container's, say."""

import pathlib
from collections.abc import Callable

import jax
import pytest

from salt_jax.main import main
from salt_jax.training import compilation


def test_generate_goes_on_without_a_compilation_cache(
    case: Callable[[str], pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(case("resaved_tokenizer"))  # which has a model
    assert main(["convert", "--huggingface=new", "--output_dir=run"]) == 0
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    compilation._warn_not_kept.cache_clear()
    before = jax.config.jax_compilation_cache_dir
    capsys.readouterr()
    generate = ["generate", "--model=run", "--prompt=a", "--max_new_tokens=2"]
    for folder in ("gen", "again"):
        assert main([*generate, f"--output_dir={folder}"]) == 0
    assert jax.config.jax_compilation_cache_dir == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "(this user has no home folder): programs are compiled again in each run" in error
