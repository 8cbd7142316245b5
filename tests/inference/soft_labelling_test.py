"""Stored soft labels end to end: the pass, its restart, and a run that learns from them."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import numpy as np
import pytest
from flax import linen as nn

from salt_jax.commands.score import score
from salt_jax.commands.select import select
from salt_jax.data.denoisers import Objectives
from salt_jax.data.input_pipeline import in_order
from salt_jax.data.label_format import Labels
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.distill import losses, schedules
from salt_jax.distill.selection import RandomRows
from salt_jax.errors import InputError
from salt_jax.inference import soft_labelling
from salt_jax.inference.model_pass import ModelPass
from salt_jax.models import decoder
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import find_model
from salt_jax.training.config import Devices
from salt_jax.training.in_order import ranks_of_batch
from salt_jax.training.ledger import Cost
from salt_jax.training.partitioning import DEFAULT_RULES, MeshConfig, partitioned
from tests.training.loop_test import assert_same, metrics_of, params_of

Run = Callable[..., pathlib.Path]
STEP = schedules.Step(omega=0.6, n_kd=4)
LOSS = losses.LossConfig(teacher_temperature=0.5)


@pytest.fixture(scope="module")
def make_labels(
    slm: pathlib.Path, cache: PackedCache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., pathlib.Path]:
    def make(folder: pathlib.Path | None = None, **settings: Any) -> pathlib.Path:
        folder = folder or tmp_path_factory.mktemp("labels")
        defaults: dict[str, Any] = {
            "scorer": str(slm),
            "cache": str(cache.path),
            "soft_labels": cache.vocabulary_size,
            "soft_label_temperature": 0.5,
            "batch_size": 8,
            "devices": Devices(compilation_cache=""),
        }
        score(RunFolder(folder, "score"), **{**defaults, **settings})
        return folder

    return make


@pytest.fixture(scope="module")
def labels(make_labels: Callable[..., pathlib.Path]) -> pathlib.Path:
    """Of all ids, for the whole split."""
    return make_labels()


def distance(one: pathlib.Path, other: pathlib.Path) -> float:
    """Between two runs' last parameters."""
    ours, theirs = (np.concatenate([x.ravel() for x in params_of(run)]) for run in (one, other))
    return float(np.linalg.norm(ours - theirs))


def test_a_run_from_labels_is_the_run_with_the_teacher(
    run_train: Run, slm: pathlib.Path, labels: pathlib.Path
) -> None:
    """All ids are kept, so they differ by float16's rounding alone."""
    taught = run_train(schedule=STEP, loss=LOSS, teacher=str(slm))
    stored = run_train(schedule=STEP, loss=LOSS, soft_labels=str(labels))
    plain = run_train(loss=LOSS)
    assert distance(stored, taught) < 0.02 * distance(plain, taught)
    for name in ("soft_loss", "teacher_hard", "agreement"):
        ours, theirs = ([line[name] for line in metrics_of(run)[:4]] for run in (stored, taught))
        np.testing.assert_allclose(ours, theirs, rtol=5e-3)
    assert "soft_loss" not in metrics_of(stored)[4]


class Labelled:
    """Stands for the writer of one shard of 8 rows, and keeps their labels."""

    def unfinished(self, worker: int, workers: int) -> list[int]:
        return [0]

    def row_ids(self, shard: int) -> list[int]:
        return list(range(8))

    def write(self, shard: int, labels: Iterable[Labels], workers: int) -> None:
        [self.labels] = labels


def test_labels_and_ranks_of_a_model_with_a_soft_cap(cache: PackedCache) -> None:
    """Both are of decoder.logits."""
    size, mesh, writer = cache.vocabulary_size, MeshConfig().make(), Labelled()
    config = DecoderConfig(16, 1, 2, 32, vocab_size=size, logits_soft_cap=0.2)
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    batch = next(in_order(cache.split("train"), 8, cache.start_id))
    hidden = decoder.hidden_states(config, params, batch)
    logits = decoder.logits(hidden, decoder.head_kernel(params, config), config)[..., :size]
    truth, log_p = batch["targets"][..., None], jax.nn.log_softmax(logits)
    loss = -np.take_along_axis(np.asarray(log_p), truth, axis=-1)[..., 0]

    rows = ModelPass(config, cache, "train", 8, mesh)
    soft_labelling.label_rows(rows, params, size, 0.5, cast(Any, writer))
    log_q = np.asarray(jax.nn.log_softmax(logits / 0.5))
    at_ids, counts = (
        np.take_along_axis(log_q, writer.labels.ids, axis=-1),
        batch["loss_weights"] > 0,
    )
    np.testing.assert_allclose(writer.labels.log_q[counts], at_ids[counts], atol=5e-3)
    np.testing.assert_allclose(writer.labels.teacher_loss[counts], loss[counts], atol=5e-3)

    with partitioned(mesh):
        ranks = ranks_of_batch(config, params, batch, mesh, DEFAULT_RULES, 64)
    np.testing.assert_allclose(ranks[0][counts], loss[counts], atol=1e-5)


def test_the_pass_is_charged_and_the_teacher_is_named(
    run_train: Run, slm: pathlib.Path, labels: pathlib.Path, cache: PackedCache
) -> None:
    run = run_train(schedule=STEP, loss=LOSS, soft_labels=str(labels))
    summary = json.loads((run / "summary.json").read_text())
    rows = len(cache.split("train"))
    cost = Cost.of(find_model(slm, None, "model").config, rows, cache.sequence_length)
    assert summary["scoring_flops"] == cost.flops
    assert summary["teacher_flops"] == 0
    assert summary["teacher"]["path"] == str(slm)
    assert summary["teacher"]["soft_labels"] == str(labels)
    assert summary["teacher"]["digest"] == StoredLabels.open(labels).digest


def test_resumed_equals_straight(
    run_train: Run, labels: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings: dict[str, Any] = {"schedule": STEP, "loss": LOSS, "soft_labels": str(labels)}
    straight = run_train(**settings)
    for cut in (2, 4):  # in stage 1, and at the switch
        folder = tmp_path / str(cut)
        run_train(folder, **{**settings, "steps": 6})
        for later in (folder / "checkpoints").iterdir():
            if int(later.name) > cut:
                for file in sorted(later.rglob("*"), reverse=True):
                    file.unlink() if file.is_file() else file.rmdir()
                later.rmdir()
        (folder / "summary.json").unlink()
        run_train(folder, **settings)
        assert_same(straight, folder)


def test_fewer_ids_come_close(
    run_train: Run, slm: pathlib.Path, make_labels: Callable[..., pathlib.Path]
) -> None:
    few = make_labels(soft_labels=96, soft_label_encoding="uint8")
    taught = run_train(schedule=STEP, loss=LOSS, teacher=str(slm))
    stored = run_train(schedule=STEP, loss=LOSS, soft_labels=str(few))
    plain = run_train(loss=LOSS)
    assert distance(stored, taught) < 0.5 * distance(plain, taught)


def test_labels_of_a_selection(
    run_train: Run,
    cache: PackedCache,
    make_labels: Callable[..., pathlib.Path],
    labels: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / f"selection{seed}")
        select(
            RunFolder(folders[-1], "select"), cache=str(cache.path), rule=RandomRows(32, seed=seed)
        )
    stored = make_labels(selection=str(folders[0]))
    chosen = Selection.open(folders[0]).row_ids
    found, whole = StoredLabels.open(stored), StoredLabels.open(labels)
    assert found.rows == 32
    for ours, theirs in zip(found.read(chosen)[1:], whole.read(chosen)[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-3)
    settings: dict[str, Any] = {"schedule": STEP, "loss": LOSS, "soft_labels": str(stored)}
    run_train(selection=str(folders[0]), **settings)
    with pytest.raises(InputError, match="stage 1 reads all rows"):
        run_train(**settings)
    with pytest.raises(InputError, match="selection_steps is 2 and stage 1 has 4 steps"):
        run_train(selection=str(folders[0]), selection_steps=2, **settings)
    with pytest.raises(InputError, match="stage 1 reads another one"):
        run_train(selection=str(folders[1]), **settings)


def test_a_killed_pass_goes_on_and_gives_the_same_bytes(
    make_labels: Callable[..., pathlib.Path],
    labels: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = make_labels(shard_rows=10)
    made: list[int] = []

    class Killed(BaseException):
        pass

    write = soft_labelling.SoftLabelsWriter.write

    def dying(writer: Any, shard: Any, *arguments: Any) -> None:
        if len(made) == 2:
            raise Killed
        made.append(shard.index)
        write(writer, shard, *arguments)

    folder = tmp_path / "labels"
    with monkeypatch.context() as patched:
        patched.setattr(soft_labelling.SoftLabelsWriter, "write", dying)
        with pytest.raises(Killed):
            make_labels(folder, shard_rows=10)
    made.clear()
    monkeypatch.setattr(
        soft_labelling.SoftLabelsWriter,
        "write",
        lambda writer, shard, *rest: (made.append(shard.index), write(writer, shard, *rest))[1],
    )
    make_labels(folder, shard_rows=10)
    assert made == [2, 3, 4]
    assert StoredLabels.open(folder).digest == StoredLabels.open(straight).digest
    # Shards of another size hold the same labels.
    for one, other in zip(
        StoredLabels.open(folder).read(range(48)),
        StoredLabels.open(labels).read(range(48)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": losses.LossConfig()}, r"temperature 0.5 and .*teacher_temperature is 0.25"),
        ({"loss": dataclasses.replace(LOSS, teacher_top_k=259)}, None),
        ({"loss": dataclasses.replace(LOSS, teacher_top_k=260)}, "teacher_top_k is 260"),
        ({"objectives": Objectives()}, "objectives changes rows"),
        ({"teacher": "somewhere"}, "Both the teacher somewhere and the soft labels"),
    ],
)
def test_what_does_not_fit_is_refused(
    changed: dict[str, Any],
    message: str | None,
    run_train: Run,
    labels: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    settings = {"schedule": STEP, "loss": LOSS, "soft_labels": str(labels), **changed}
    if message is None:
        run_train(**settings)
        return
    with pytest.raises(InputError, match=message):
        run_train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"soft_labels": 999}, "soft_labels is 999, expected 1 to"),
        ({"soft_labels": -1}, "soft_labels is -1"),
        ({"soft_label_encoding": "int4"}, "soft_label_encoding is 'int4'"),
        ({"soft_label_temperature": 0.0}, "soft_label_temperature is 0.0"),
        ({"selection": "nowhere"}, "nowhere does not exist"),
        ({"soft_labels": 0, "selection": "nowhere"}, "scores are of all rows"),
    ],
)
def test_bad_settings_of_the_pass(
    changed: dict[str, Any],
    message: str,
    make_labels: Callable[..., pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(InputError, match=message):
        make_labels(tmp_path / "labels", **changed)
    assert not (tmp_path / "labels").exists()
