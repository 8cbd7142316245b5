"""Inputs that once broke the product, kept beside the clone in ../shared/cases."""

import pathlib
import shutil
from collections.abc import Callable

import pytest

CASES = pathlib.Path(__file__).parents[2].joinpath("../shared/cases").resolve()

# The cases' gin files are of the form before settings were grouped.
RENAMED = (
    (b"import prepare\n", b"import prepare\nfrom salt_jax.preparation import packing\n"),
    (b"prepare.prepare.sequence_length", b"packing.Packing.sequence_length"),
)


@pytest.fixture
def case(tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """Copies a case's folder into the test's own; skips the test where the cases are not there."""

    def copy(name: str) -> pathlib.Path:
        if not (CASES / name).is_dir():
            pytest.skip(f"{CASES / name} is not there: it is kept beside the clone, in ../shared")
        folder = shutil.copytree(CASES / name, tmp_path / name, symlinks=True)
        for file in folder.rglob("*.gin"):
            data = file.read_bytes()
            for older, now in RENAMED:
                data = data.replace(older, now)
            file.write_bytes(data)
        return folder

    return copy
