"""Inputs that once broke the product, kept beside the clone in ../shared/cases."""

import pathlib
import shutil
from collections.abc import Callable

import pytest

CASES = pathlib.Path(__file__).parents[2].joinpath("../shared/cases").resolve()


@pytest.fixture
def case(tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """Copies a case's folder into the test's own; skips the test where the cases are not there."""

    def copy(name: str) -> pathlib.Path:
        if not (CASES / name).is_dir():
            pytest.skip(f"{CASES / name} is not there: it is kept beside the clone, in ../shared")
        return shutil.copytree(CASES / name, tmp_path / name, symlinks=True)

    return copy
