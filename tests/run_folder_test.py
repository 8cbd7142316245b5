"""The output folder: what it records, and what it refuses."""

import json
import pathlib

import pytest

from salt_jax.errors import InputError
from salt_jax.run_folder import RunFolder, library_versions, to_json

LONG = """import train

# Parameters for train.train:
# ==============================================================================
train.train.keep_steps = \\
    (1000,
     2000,
     {last})
train.train.steps = {steps}
"""


def folder(path: pathlib.Path, last: int = 3000, steps: int = 5, verb: str = "train") -> RunFolder:
    return RunFolder(path, verb, lambda: LONG.format(last=last, steps=steps), ("salt", verb))


def test_same_configuration_goes_on(tmp_path: pathlib.Path) -> None:
    folder(tmp_path / "a").begin()
    folder(tmp_path / "a").begin()
    origin = json.loads((tmp_path / "a" / "run.json").read_text())
    assert origin["command_line"] == ["salt", "train"]
    assert origin["versions"]["numpy"]
    assert "python" in library_versions()


@pytest.mark.parametrize("change", [{"last": 3001}, {"steps": 6}])
def test_another_configuration_is_refused(tmp_path: pathlib.Path, change: dict[str, int]) -> None:
    folder(tmp_path / "a").begin()
    with pytest.raises(InputError, match=r"holds a run with another configuration: .* is now"):
        folder(tmp_path / "a", **change).begin()  # type: ignore[arg-type]
    folder(tmp_path / "a", **change).begin(replace=True)  # type: ignore[arg-type]


def test_another_verb_a_file_and_damage_are_refused(tmp_path: pathlib.Path) -> None:
    folder(tmp_path / "a").begin()
    with pytest.raises(InputError, match="holds a run of `salt train`"):
        folder(tmp_path / "a", verb="score").begin(replace=True)
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json is damaged"):
        folder(tmp_path / "a").begin()
    (tmp_path / "b").write_text("")
    with pytest.raises(InputError, match="is a file"):
        folder(tmp_path / "b").begin()
    with pytest.raises(InputError, match="cannot be written"):
        folder(tmp_path / "b" / "c").begin()


def test_json_has_no_nan() -> None:
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5]})) == {
        "a": None,
        "b": [None, 1.5],
    }
