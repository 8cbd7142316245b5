"""The output folder: what it records, and what it refuses."""

import json
import pathlib

import pytest

from salt_jax.commands.train import MAY_CHANGE
from salt_jax.errors import InputError
from salt_jax.storage.buckets import BucketError
from salt_jax.storage.run_folder import RUN_FILE, RunFolder, library_versions, to_json

LONG = """import train

# Parameters for checkpoints.CheckpointConfig:
# ==============================================================================
checkpoints.CheckpointConfig.keep_steps = \\
    (1000,
     2000,
     {last})
config.TrainConfig.steps = {steps}
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


MACROS = """
config.TrainConfig.steps = 5
config.Data.batch_size = {batch}
partitioning.MeshConfig.fsdp = %DEVICES
DEVICES = {devices}
PEAK = {peak}
learning_rates.WarmupCosine.peak = %PEAK
"""


def test_what_may_change_is_said_and_the_rest_is_refused(tmp_path: pathlib.Path) -> None:
    def begin(*may_change: str, batch: int = 8, devices: int = 1, peak: float = 0.1) -> list[str]:
        text = MACROS.format(batch=batch, devices=devices, peak=peak)
        return RunFolder(tmp_path / "a", "train", lambda: text).begin(may_change=may_change)

    allowed = ("Data.batch_size", "MeshConfig")
    assert begin(*allowed) == begin(*allowed) == []
    assert begin(*allowed, batch=16, devices=4) == [
        "DEVICES was 1 and is now 4",
        "config.Data.batch_size was 8 and is now 16",
    ]
    assert begin(*allowed, batch=16, devices=4) == []
    with pytest.raises(InputError, match=r"configuration: PEAK was 0.1 and is now 0.2; choose"):
        begin(*allowed, batch=8, peak=0.2)
    for left in (("Data.batch_size",), ("MeshConfig",), ("batch", "MeshConfig")):
        with pytest.raises(InputError, match="holds a run with another configuration"):
            begin(*left)


def test_a_run_of_an_older_version_says_so(tmp_path: pathlib.Path) -> None:
    """Its settings had other names, and were the verb's own."""

    def begin(text: str, replace: bool = False, verb: str = "train") -> list[str]:
        return RunFolder(tmp_path / verb, verb, lambda: text).begin(replace=replace)

    begin("train.train.seed = 3\noptimizers.LearningRate.peak = 0.1\n")
    now = "config.TrainConfig.seed = 3\n"
    with pytest.raises(
        InputError, match=r"of an older version of salt_jax, with other setting names"
    ):
        begin(now)
    begin(now, replace=True)
    with pytest.raises(InputError, match="another configuration"):
        begin("config.TrainConfig.seed = 4\n")
    begin("evaluate.evaluate.cache = 'a'\n", verb="evaluate")
    with pytest.raises(
        InputError, match=r"of an older version of salt_jax, with other setting names"
    ):
        begin("held_out.HeldOut.cache = 'a'\n", verb="evaluate")


def test_a_macro_may_change_if_all_that_it_is_given_to_may(tmp_path: pathlib.Path) -> None:
    def begin(rows: int, *may_change: str) -> list[str]:
        text = f"config.Data.batch_size = %ROWS\nselection.RandomRows.m = %ROWS\nROWS = {rows}\n"
        return RunFolder(tmp_path / "a", "train", lambda: text).begin(may_change=may_change)

    begin(5)
    with pytest.raises(InputError, match="ROWS was 5 and is now 6"):
        begin(6, "Data.batch_size")
    assert begin(6, "Data.batch_size", "RandomRows.m") == ["ROWS was 5 and is now 6"]


def test_a_run_goes_on_where_its_inputs_were_moved(tmp_path: pathlib.Path) -> None:
    def begin(folder: str, seed: int = 0) -> list[str]:
        names = ("Data.cache", "Teacher.path", "Data.selection", "Method.soft_labels")
        lines = [f"config.{name} = '{folder}/{name}'" for name in names]
        text = "\n".join([*lines, f"config.TrainConfig.seed = {seed}"])
        return RunFolder(tmp_path, "train", lambda: text).begin(may_change=MAY_CHANGE)

    begin("then")
    assert len(begin("now")) == 4
    with pytest.raises(InputError, match=r"config\.TrainConfig\.seed was 0 and is now 1"):
        begin("later", seed=1)


def test_another_verb_a_file_and_damage_are_refused(tmp_path: pathlib.Path) -> None:
    folder(tmp_path / "a").begin()
    with pytest.raises(InputError, match="holds a run of `salt train`"):
        folder(tmp_path / "a", verb="score").begin(replace=True)
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json is damaged"):
        folder(tmp_path / "a").begin()
    (tmp_path / "b").write_text("")
    for path in (tmp_path / "b", tmp_path / "b" / "c"):
        with pytest.raises(InputError, match="b is a file: --output_dir must name a folder"):
            folder(path)


def test_a_damaged_configuration_is_told_of(tmp_path: pathlib.Path) -> None:
    folder(tmp_path / "a").begin()
    for damage in (lambda file: file.write_bytes(b"\xff"), lambda file: file.write_text("a b")):
        damage(tmp_path / "a" / "config.gin")
        with pytest.raises(InputError, match=r"config.gin is damaged: choose another --output_dir"):
            folder(tmp_path / "a").begin()
    (tmp_path / "a" / "config.gin").unlink()
    with pytest.raises(InputError, match=r"config.gin is damaged: choose another --output_dir"):
        folder(tmp_path / "a").begin()
    folder(tmp_path / "a").begin(replace=True)


def test_what_only_a_text_speaks_of_uses_no_macro(tmp_path: pathlib.Path) -> None:
    def begin(rows: int) -> list[str]:
        text = f"config.Method.arm = '%ROWS'\nconfig.Data.batch_size = %ROWS\nROWS = {rows}\n"
        return RunFolder(tmp_path, "train", lambda: text).begin(may_change=("Data.batch_size",))

    begin(5)
    assert begin(6) == ["ROWS was 5 and is now 6"]


def test_json_has_no_nan() -> None:
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5]})) == {
        "a": None,
        "b": [None, 1.5],
    }


def test_a_bucket_that_takes_nothing_is_told_of_before_the_run(tmp_path):
    def refused() -> None:
        raise BucketError("s3://bucket/run cannot be written.")

    with pytest.raises(BucketError):
        RunFolder(tmp_path / "new", "train", send=refused).begin()
    assert not (tmp_path / "new").exists()
    RunFolder(tmp_path / "old", "train").begin()
    with pytest.raises(BucketError):
        RunFolder(tmp_path / "old", "train", send=refused).begin()
    assert (tmp_path / "old" / RUN_FILE).exists()


def test_workers_share_no_folder_in_a_bucket(tmp_path):
    with pytest.raises(
        InputError, match="s3://bucket/run is not a folder that several workers can share"
    ):
        RunFolder(tmp_path / "run", "score", url="s3://bucket/run").begin(part="0-of-2")
    assert not (tmp_path / "run").exists()
