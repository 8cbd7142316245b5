"""What is seen of a run: its profile, its wall time over restarts, its cost, Weights & Biases."""

import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import pytest

from salt_jax.errors import InputError
from salt_jax.training.checkpoints import CheckpointConfig, read_progress
from salt_jax.training.config import Monitoring
from salt_jax.training.wall_time import PARTS
from tests.training.doubles import Killed, kill_at

Run = Callable[..., pathlib.Path]


def records_of(run: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def profiled_steps(run: pathlib.Path, session: str) -> set[int]:
    (trace,) = (run / "profile/plugins/profile" / session).glob("*.xplane.pb")
    return {
        int(value)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }


def test_a_profile_has_the_steps_that_were_asked_for(run_train: Run) -> None:
    run = run_train(monitoring=Monitoring(profile_steps="2:4"))
    assert profiled_steps(run, "steps_2_4") == {2, 3, 4}


def test_a_profile_of_what_is_left(
    run_train: Run,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run_train(tmp_path)
    run_train(tmp_path, monitoring=Monitoring(profile_steps="4:5"))
    assert profiled_steps(tmp_path, "steps_4_5") == {5}, "it continues after step 4"
    assert "no profile" not in capsys.readouterr().err
    run_train(tmp_path, monitoring=Monitoring(profile_steps="4:5"))
    assert "no profile" not in capsys.readouterr().err, "there is one already"
    run_train(tmp_path, monitoring=Monitoring(profile_steps="1:2"))
    assert "continues after step 6: no profile is written" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["", "3", "4:3", "0:2", "-1:2", "a:b", "1:2:3"])
def test_a_malformed_range_of_steps_is_refused(steps: str) -> None:
    with pytest.raises(InputError, match="expected the first and the last step to profile"):
        Monitoring(profile_steps=steps)


def test_wall_time_goes_on_over_a_kill(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "monitoring": Monitoring(price=3.0),
        "checkpoints": CheckpointConfig(save_every=3, keep_every=3),
    }
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run_train(tmp_path, **settings)
    killed = records_of(tmp_path)[-1]["wall_time"]
    steps_at_checkpoint = read_progress(tmp_path, 3)["wall_time"]["steps_seconds"]
    run_train(tmp_path, **settings)
    summary = json.loads((tmp_path / "summary.json").read_text())["wall_time"]
    for account in (killed, summary, *(record["wall_time"] for record in records_of(tmp_path))):
        parts = [account[f"{part}_seconds"] for part in PARTS]
        assert sum(parts) == pytest.approx(account["wall_seconds"])
        assert account["goodput"] == pytest.approx(account["steps_seconds"] / sum(parts))
        assert account["cost"] == pytest.approx(3 * account["chip_hours"])
    assert (killed["starts"], summary["starts"]) == (1, 2)
    assert killed["restore_seconds"] == killed["lost_steps_seconds"] == 0
    lost = killed["steps_seconds"] - steps_at_checkpoint
    assert summary["lost_steps_seconds"] == pytest.approx(lost)
    for part in PARTS:
        assert summary[f"{part}_seconds"] > 0, part
    for part in set(PARTS) - {"steps"}:
        assert summary[f"{part}_seconds"] >= killed[f"{part}_seconds"], part
    assert killed["seconds_left"] > 0
    assert summary["seconds_left"] == 0


class FakeWandb(types.ModuleType):
    """The documented interface of wandb, as far as it is used: init, Run.log, Run.finish, Error."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_codes: list[int] = []
        self.refuses = False

    def init(self, **settings: Any) -> "FakeWandb":
        if self.refuses:
            raise self.Error("api_key not configured")
        self.begun.append(settings)
        self.id = settings["id"] or f"run{len(self.begun)}"
        return self

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_get_every_record_in_one_run(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb
) -> None:
    settings = {"monitoring": Monitoring(wandb_project="salt")}
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run_train(tmp_path, **settings)
    run_train(tmp_path, **settings)
    assert [one["id"] for one in wandb.begun] == [None, "run1"]
    for one in wandb.begun:
        assert (one["project"], one["resume"]) == ("salt", "allow")
        assert one["dir"] == str(tmp_path)
        assert one["config"]["data"]["batch_size"] == 8
    assert wandb.exit_codes == [1, 0]
    records = records_of(tmp_path)
    assert [step for step, _ in wandb.logged] == [record["step"] for record in records]
    for (_, data), record in zip(wandb.logged, records, strict=True):
        assert data[f"{record['kind']}/log_perplexity"] == record["log_perplexity"]


def test_weights_and_biases_may_refuse_or_be_missing(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb
) -> None:
    wandb.refuses = True
    with pytest.raises(InputError, match=r"api_key not configured\): log in with"):
        run_train(monitoring=Monitoring(wandb_project="salt"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"needs the library wandb.*salt_jax\[wandb\]"):
        run_train(tmp_path / "run", monitoring=Monitoring(wandb_project="salt"))
    assert not (tmp_path / "run").exists()
