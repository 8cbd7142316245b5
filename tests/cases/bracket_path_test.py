"""A run's folder whose name is a pattern."""

import pathlib
from collections.abc import Callable

import pytest

from salt_jax.main import main

MODEL = ["--compilation_cache=", "--gin_file=m.gin", "--cache=cache"]


def test_its_checkpoints_are_read(
    case: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case("bracket_path"))
    of_older_form = pathlib.Path("m.gin").read_text(encoding="utf-8")
    pathlib.Path("m.gin").write_text(
        of_older_form.replace(
            "salt_jax.commands import train", "salt_jax.training import config"
        ).replace("train.train.batch_size", "config.Data.batch_size"),
        encoding="utf-8",
    )
    rows = ["--gin_file=b.gin", "--gin.TEXT='base.jsonl'"]
    assert main(["prepare", *rows, "--output_dir=cache"]) == 0
    train = ["train", *MODEL, "--steps=10", "--batch_size=8", "--output_dir=lr[0.003]/run"]
    assert main(train) == 0
    assert main(train) == 0  # which starts from the checkpoint
    read = ["--compilation_cache=", "--model=lr[0.003]/run", "--cache=cache"]
    assert main(["evaluate", *read, "--output_dir=[ev]"]) == 0
