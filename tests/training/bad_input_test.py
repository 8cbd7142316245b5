"""Settings that don't fit: one clear sentence each, and nothing written."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from salt_jax.commands.evaluate import evaluate
from salt_jax.commands.score import score
from salt_jax.commands.select import select
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import schedules
from salt_jax.distill.losses import LossConfig
from salt_jax.distill.scores import ScoreConfig
from salt_jax.distill.selection import RandomRows, TopRows
from salt_jax.errors import InputError
from salt_jax.evaluation.held_out import HeldOut
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.config import Devices
from salt_jax.training.learning_rates import WarmupCosine, WarmupStableDecay
from salt_jax.training.optimizers import AdamW, Muon
from salt_jax.training.partitioning import MeshConfig

Run = Callable[..., pathlib.Path]
STUDENT = DecoderConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=64)
SALT = schedules.Step(omega=0.6, n_kd=3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stage1_microbatches": 3}, "8 devices in 3 microbatches"),
        ({"mesh": MeshConfig(data=3)}, "need 6 devices and there are 8"),
        ({"mesh": MeshConfig(data=3, fsdp=1)}, "need 3 devices and there are 8"),
        ({"model": dataclasses.replace(STUDENT, vocab_size=100)}, "has 259 ids"),
        ({"model": dataclasses.replace(STUDENT, vocab_size=300)}, "has 259 ids"),
        ({"schedule": SALT}, "needs a teacher and none is set"),
    ],
)
def test_train_refuses(
    run_train: Run, settings: dict[str, Any], expected: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError) as error:
        run_train(tmp_path / "out", **settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: MeshConfig(data=-1), "at most one of them -1"),
        (lambda: MeshConfig(tensor=0), "at least 1"),
        (lambda: Devices(slice_gradient_dtype="float16"), "slice_gradient_dtype is 'float16'"),
        (
            lambda: Devices(MeshConfig(tensor=2), slice_gradient_dtype="bfloat16"),
            "takes MeshConfig.tensor 1",
        ),
        (lambda: WarmupCosine(0.0), "WarmupCosine(peak=0.0"),
        (lambda: WarmupCosine(1.0, final=-1), "final=-1"),
        (lambda: WarmupStableDecay(1.0, decay_fraction=1.5), "decay_fraction must be at most 1"),
        (lambda: WarmupStableDecay(1.0, power=0.0), "power over 0"),
        (lambda: AdamW(WarmupCosine(1.0), weight_decay=-1), "AdamW got weight_decay -1"),
        (lambda: Muon(WarmupCosine(1.0), clip_norm=-1), "Muon got weight_decay 0.0 and clip_norm"),
        (lambda: LossConfig(teacher_temperature=0), "teacher_temperature"),
        (lambda: LossConfig(teacher_temperature=-1.0), "teacher_temperature"),
        (lambda: schedules.Step(omega=1.5, n_kd=3), "omega"),
        (lambda: schedules.Step(omega=0.5, n_kd=-1), "n_kd"),
        (lambda: schedules.LinearRatioDecay(omega=1.0, n_kd=3), "omega"),
        (lambda: ScoreConfig(k=0), "k is 0"),
    ],
)
def test_configs_refuse(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert expected in str(error.value)


def test_teacher_and_student_must_share_the_tokenizer(
    run_train: Run,
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
) -> None:
    # A cache of all of a model's ids and more will do; one of fewer won't.
    slm, other = run_train(cache=str(make_cache(reserved=3).path), steps=1), cache
    with pytest.raises(InputError) as error:
        run_train(tmp_path / "out", cache=str(other.path), schedule=SALT, teacher=str(slm))
    text = str(error.value)
    assert str(slm) in text
    assert str(other.path) in text
    assert other.vocabulary_fingerprint[:12] in text
    for verb, call in {
        "score": lambda run: score(run, scorer=str(slm), cache=str(other.path)),
        "evaluate": lambda run: evaluate(run, model=str(slm), held_out=HeldOut(str(other.path))),
    }.items():
        with pytest.raises(InputError, match=r"was trained with the vocabulary"):
            call(RunFolder(tmp_path / verb, verb))
    assert list(tmp_path.iterdir()) == []


def test_k_over_the_vocabulary(
    slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError, match="k is 260 and the vocabulary has 259"):
        score(
            RunFolder(tmp_path / "out", "score"),
            scorer=str(slm),
            cache=str(cache.path),
            k=260,
        )
    assert not (tmp_path / "out").exists()


def test_selection_of_another_cache_and_without_a_stage_1(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
) -> None:
    other = make_cache(seed=1)
    select(RunFolder(tmp_path / "s", "select"), cache=str(other.path), rule=RandomRows(m=5))
    with pytest.raises(InputError, match="belongs to the cache"):
        run_train(schedule=SALT, teacher=str(slm), selection=str(tmp_path / "s"))
    select(RunFolder(tmp_path / "t", "select"), cache=str(cache.path), rule=RandomRows(m=5))
    with pytest.raises(InputError, match="no stage 1"):
        run_train(selection=str(tmp_path / "t"))


def test_m_over_the_corpus(cache: PackedCache, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"RandomRows.m is 49, but there are only 48 rows"):
        select(RunFolder(tmp_path / "s", "select"), cache=str(cache.path), rule=RandomRows(m=49))
    with pytest.raises(InputError, match="needs scores"):
        select(RunFolder(tmp_path / "s", "select"), cache=str(cache.path), rule=TopRows(m=4))
    assert not (tmp_path / "s").exists()


def test_few_selected_rows_and_what_is_longer_than_the_run_are_said(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    select(RunFolder(tmp_path, "select"), cache=str(cache.path), rule=RandomRows(m=12))
    run_train(
        steps=4,
        schedule=schedules.Step(omega=0.5, n_kd=9),
        teacher=str(slm),
        selection=str(tmp_path),
        optimizer=AdamW(WarmupCosine(5e-3, warmup_steps=5)),
    )
    text = capsys.readouterr().out
    assert "n_kd 9 is over the run's 4 steps" in text
    assert "warmup_steps 5 is over the run's 4 steps" in text
    assert "12 selected rows are fewer than the 32" in text


def test_half_written_cache(run_train: Run, cache: PackedCache, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache.path, copy)
    (copy / "COMPLETED").unlink()
    with pytest.raises(InputError, match="COMPLETED"):
        run_train(tmp_path / "out", cache=str(copy))
    assert not (tmp_path / "out").exists()


def test_too_little_disk_before_the_first_step(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"MB free, and .* checkpoints need"):
        run_train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["teacher", "selection", "cache"])
def test_resuming_on_something_else_is_refused(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
    what: str,
) -> None:
    """The folders keep their names; what is in them has changed."""
    teacher, chosen, rows = tmp_path / "slm", tmp_path / "chosen", tmp_path / "cache"
    shutil.copytree(slm, teacher)
    shutil.copytree(cache.path, rows)
    select(RunFolder(chosen, "select"), cache=str(rows), rule=RandomRows(m=12))
    settings: dict[str, Any] = {
        "cache": str(rows),
        "schedule": schedules.Step(omega=0.5, n_kd=6),
        "teacher": str(teacher),
        "selection": str(chosen),
    }
    run_train(tmp_path / "out", **settings)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "6")
    if what == "teacher":
        shutil.rmtree(teacher / "checkpoints" / "12")
    elif what == "selection":
        shutil.rmtree(chosen)
        select(RunFolder(chosen, "select"), cache=str(rows), rule=RandomRows(m=12, seed=1))
    else:
        shutil.rmtree(rows)
        shutil.copytree(make_cache(seed=9).path, rows)
        shutil.rmtree(chosen)
        select(RunFolder(chosen, "select"), cache=str(rows), rule=RandomRows(m=12))
    with pytest.raises(InputError, match=rf"checkpoint of step 4 .* was made with the {what}"):
        run_train(tmp_path / "out", **settings)
