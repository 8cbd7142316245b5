"""Forks: bit for bit the runs that train all of their steps themselves."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from salt_jax.commands.select import select
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import schedules
from salt_jax.distill.alignment import Alignment
from salt_jax.distill.selection import RandomRows
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.storage.buckets import path_of
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import CheckpointConfig, complete_steps
from salt_jax.training.learning_rates import WarmupStableDecay
from salt_jax.training.optimizers import Muon
from tests.bucket_emulator import BucketEmulator
from tests.training.doubles import Killed, kill_at
from tests.training.loop_test import assert_same, metrics_of

Run = Callable[..., pathlib.Path]
LET = Alignment(stop=2, layer=1)  # of a wider student: it has a projection


def salt(n_kd: int) -> schedules.Step:
    return schedules.Step(omega=0.6, n_kd=n_kd)


def optimizer_of(run: pathlib.Path, step: int) -> list[Any]:
    """The leaves of the state beside the parameters."""
    folder = (run / "checkpoints" / str(step) / "optimizer").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore(folder))


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if "second" not in name and name not in ("mfu", "wall_time")
    }


@pytest.mark.parametrize(
    ("trunk_n_kd", "n_kd", "more"),
    [
        (5, 2, {"alignment": LET}),
        (4, 3, {"selection": RandomRows(m=24), "stage2_rows": "unused"}),
        (2, 5, {"optimizer": Muon(WarmupStableDecay(5e-3, 2, decay_fraction=0.4))}),
    ],
    ids=["at n_kd, salt and let", "before n_kd, salt_ds", "of a shorter trunk, muon"],
)
def test_a_fork_equals_the_run_alone(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    trunk_n_kd: int,
    n_kd: int,
    more: dict[str, Any],
) -> None:
    """Also when it is killed and resumed, and its trunk is gone by then."""
    if "selection" in more:
        folder = RunFolder(tmp_path / "rows", "select")
        select(folder, cache=str(cache.path), rule=more["selection"])
        more = {**more, "selection": str(tmp_path / "rows")}
    settings = {"teacher": str(slm), **more}
    alone = run_train(schedule=salt(n_kd), **settings)
    trunk, fork = tmp_path / "trunk", tmp_path / "fork"
    run_train(trunk, schedule=salt(trunk_n_kd), **settings)
    settings |= {"schedule": salt(n_kd), "fork_from": str(trunk)}
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run_train(fork, **settings)
    place = pathlib.PurePath("checkpoints", "2", "digests.json")
    assert os.path.samefile(trunk / place, fork / place)
    trunk.rename(tmp_path / "elsewhere")
    run_train(fork, **settings)
    for step in (4, 6):
        assert_same(alone, fork, step)
        for x, y in zip(optimizer_of(alone, step), optimizer_of(fork, step), strict=True):
            np.testing.assert_array_equal(x, y)
    for kind in ("train", "eval"):
        steps = [one["step"] for one in metrics_of(fork, kind)]
        assert steps == sorted(steps)
        by_step = {one["step"]: timeless(one) for one in metrics_of(fork, kind)}  # 5 is there twice
        assert by_step == {one["step"]: timeless(one) for one in metrics_of(alone, kind)}
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (fork, alone))
    assert timeless(ours) == timeless(theirs)
    saved, line = json.loads((fork / "fork.json").read_text()), metrics_of(alone)[1]
    assert saved["step"] == line["step"] == 2
    assert saved["saved_flops"] == line["student_flops"] + line["teacher_flops"] > 0


def test_a_fork_that_is_killed_while_it_copies_starts_again(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file system without hard links gets a copy."""
    settings: dict[str, Any] = {"teacher": str(slm), "steps": 4, "evaluate_every": 9}
    alone, trunk = run_train(schedule=salt(2), **settings), run_train(schedule=salt(4), **settings)
    settings |= {"schedule": salt(2), "fork_from": str(trunk)}
    linked: list[str] = []

    def refuse(source: str, target: str) -> None:
        linked.append(target)
        if len(linked) == 5:
            raise Killed
        raise OSError("no hard links")

    monkeypatch.setattr("salt_jax.training.fork.os.link", refuse)
    with pytest.raises(Killed):
        run_train(tmp_path, **settings)
    assert complete_steps(tmp_path) == []
    run_train(tmp_path, **settings)
    assert complete_steps(tmp_path) == [2, 4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name] == []
    assert_same(alone, tmp_path)


def test_a_fork_from_a_bucket_into_a_bucket(
    bucket: BucketEmulator, run_train: Run, slm: pathlib.Path
) -> None:
    pytest.importorskip("gcsfs")
    settings: dict[str, Any] = {"teacher": str(slm), "steps": 4, "evaluate_every": 9}
    alone = run_train(schedule=salt(2), **settings)
    trunk, fork = path_of("gs://bucket/trunk"), path_of("gs://bucket/fork")
    run_train(trunk, schedule=salt(4), **settings)
    run_train(fork, schedule=salt(2), fork_from="gs://bucket/trunk", **settings)
    assert complete_steps(fork) == [2, 4]
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (fork, alone))
    assert ours["log_perplexity"] == theirs["log_perplexity"]
    assert ours["train_flops"] == theirs["train_flops"]


def test_what_cannot_be_forked_is_refused(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings: dict[str, Any] = {"teacher": str(slm), "folder": tmp_path / "out"}
    late = CheckpointConfig(save_every=0, keep_steps=(5,))
    trunk = run_train(teacher=str(slm), schedule=salt(6), checkpoints=late)
    forks = {**settings, "fork_from": str(trunk)}
    with pytest.raises(
        InputError, match=r"step 5, past 4, .* n_kd 4 here and 6 there.*--keep_steps"
    ):
        run_train(schedule=salt(4), **forks)
    # A trunk whose stage 1 has ended has no projection for a fork that goes on.
    aligned = {"alignment": LET, "teacher": str(slm), "checkpoints": late}
    short = run_train(schedule=salt(5), **aligned)
    with pytest.raises(InputError, match=r"step 5, past 4, .* n_kd 6 here and 5 there"):
        run_train(tmp_path / "out", schedule=salt(6), fork_from=str(short), **aligned)
    for schedule in (
        schedules.LinearDecay(omega=0.6, n_kd=5, start=1),
        schedules.Adaptive(omega=0.6, most=5),
    ):
        with pytest.raises(InputError, match=f"schedule is {type(schedule).__name__}: it needs"):
            run_train(schedule=schedule, **forks)
    with pytest.raises(InputError, match=r"flops_of is .*, and a fork has the steps of its trunk"):
        run_train(schedule=salt(5), flops_of=str(trunk), **forks)
    with pytest.raises(InputError, match="which is not the output folder of a `salt train` with"):
        run_train(schedule=salt(5), **{**forks, "fork_from": str(tmp_path / "nowhere")})
    # At n_kd no step needs the teacher, and yet it must be the trunk's.
    other = {**forks, "teacher_step": 4}
    with pytest.raises(InputError, match=r"^Step 5 of .* was made with the teacher"):
        run_train(schedule=salt(5), **other)
    assert not (tmp_path / "out").exists()


def test_a_fork_has_the_settings_of_its_trunk_but_for_n_kd(
    cache: PackedCache,
    slm: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = {"embed_dim": 16, "num_layers": 1, "num_heads": 1, "mlp_dim": 16}
    command = [
        *("train", "--gin_file=runs/pretrain.gin", f"--teacher={slm}", f"--cache={cache.path}"),
        *(f"--{name}={value}" for name, value in tiny.items()),
        *("--steps=3", "--gin.LEARNING_RATE=1e-3", "--compilation_cache=", "--batch_size=8"),
    ]
    method = "--gin_file=methods/salt.gin"
    trunk, out = tmp_path / "trunk", f"--output_dir={tmp_path / 'out'}"
    keeps = ("--keep_steps=(2,)", "--gin.N_KD=3", f"--output_dir={trunk}")
    assert main([*command, method, *keeps]) == 0
    fork = [*command, method, "--gin.N_KD=2", f"--fork_from={trunk}", out]
    capsys.readouterr()
    for changed, said in (
        ("--gin.LEARNING_RATE=2e-3", "LEARNING_RATE was 0.001 and is now 0.002"),
        ("--batch_size=16", "config.Data.batch_size was 8 and is now 16"),
        ("--steps=4", "config.TrainConfig.steps was 3 and is now 4"),
        ("--data.seed=1", "config.Data.seed was 0 and is now 1"),
        ("--gin_file=methods/salt_let.gin", "alignment.Alignment.stop was unset"),
    ):
        assert main([*fork, changed]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert said in error, error
    assert not (tmp_path / "out").exists()
    assert main([*fork, "--arm=another", "--log_every=1", "--gin.SAVE_EVERY=1"]) == 0
    assert f"starts from step 2 of {trunk}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["distill_steps"] == 2
