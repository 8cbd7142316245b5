"""A byte order mark in front of a gin file."""

import pathlib
from collections.abc import Callable

import pytest

import gin
from salt_jax.cli.command_line import parse_arguments
from salt_jax.cli.configuration import configure


def test_is_dropped(case: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case("bom"))
    file = pathlib.Path("bom.gin")
    outer = file.with_name("outer.gin")
    outer.write_text(f"include '{file}'\n")
    for named in (file, outer):
        for safe in ([], ["--safe_gin"]):
            typed = ["prepare", f"--gin_file={named}", "--gin.TEXT='bom.txt'", *safe]
            assert gin.get_bindings(configure(parse_arguments(typed)))["task"]
