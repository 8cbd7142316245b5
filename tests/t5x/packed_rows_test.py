"""T5X's rows: those that `salt train` reads, step by step, with what its trainer has of them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import seqio

from salt_jax.data.features import ROW_DTYPES, make_row
from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.data.label_format import LabelFormat, Labels
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import RowOrder
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import SoftLabelsWriter, StoredLabels
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill.losses import LossConfig
from salt_jax.errors import InputError
from salt_jax.t5x import packed_rows
from salt_jax.t5x.packed_rows import PackedRows, register
from tests.written_cache import write_rows

BATCH, K, TEMPERATURE = 5, 3, 0.5
SELECTED = [1, 4, 7, 8, 20, 33, 47]
LOSS = LossConfig(teacher_temperature=TEMPERATURE)
NAMES = {
    "decoder_target_tokens": "targets",
    "decoder_input_tokens": "inputs",
    "decoder_loss_weights": "loss_weights",
    "decoder_segment_ids": "segment_ids",
    "decoder_positions": "positions",
}
LABELS = {f"soft_{name}": f"soft_{name}" for name in Labels._fields}


def write_labels(
    folder: pathlib.Path, cache: PackedCache, selection: Selection | None = None, **changed: Any
) -> str:
    """Labels that a random teacher might have made."""
    ids = None if selection is None else selection.row_ids
    rows = len(cache.split("train")) if ids is None else len(ids)
    shape, rng = (rows, cache.sequence_length), np.random.default_rng(3)
    labels = Labels(
        rng.integers(cache.vocabulary_size, size=(*shape, K), dtype=np.int32),
        -np.sort(rng.exponential(3.0, (*shape, K)), axis=-1).astype(np.float16),
        -rng.exponential(3.0, shape).astype(np.float16),
        rng.exponential(3.0, shape).astype(np.float16),
    )
    settings: dict[str, Any] = {
        "cache_digest": cache.digest,
        "split": "train",
        "rows": len(cache.split("train")),
        "row_ids": ids,
        "selection_digest": selection.digest if selection else None,
        "teacher": {"path": "slm", "step": 7, "digest": "t" * 64},
        "temperature": TEMPERATURE,
        "form": LabelFormat(cache.sequence_length, cache.vocabulary_size, K),
        "shard_rows": 9,
    }
    writer = SoftLabelsWriter(folder, **{**settings, **changed})
    writer.begin()
    for shard in writer.unfinished():
        part = slice(shard.rows.start, shard.rows.stop)
        writer.write(shard, [Labels(*(array[part] for array in labels))])
    return str(writer.complete({"flops": 1.0, "tokens": 1}).path)


@pytest.fixture(scope="module")
def labels(cache: PackedCache, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("labels"), cache)


@pytest.fixture(scope="module")
def selection(cache: PackedCache, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    folder = tmp_path_factory.mktemp("selection")
    how = {"rule": "RandomRows"}
    return Selection.write(
        folder, np.array(SELECTED), cache_digest=cache.digest, split="train", how=how
    )


@pytest.fixture
def batches() -> Iterator[Callable[..., list[dict[str, np.ndarray]]]]:
    """What T5X's train.py would get of a task."""

    def read(rows: PackedRows, count: int, split: str = "train") -> list[dict[str, np.ndarray]]:
        dataset = seqio.get_dataset(
            register("tested_rows", rows),
            task_feature_lengths={},
            feature_converter=seqio.PassThroughFeatureConverter(pack=True),
            dataset_split=split,
            shuffle=False,
            num_epochs=None if split == "train" else 1,
            seed=5,
            batch_size=rows.batch_size,
        )
        return list(dataset.take(count).as_numpy_iterator())

    yield read
    seqio.TaskRegistry.remove("tested_rows")
    packed_rows._registered.cache_clear()


def pipeline(cache: PackedCache, **changed: Any) -> InputPipeline:
    """What `salt train` would read."""
    rows = cache.split("train")
    settings: dict[str, Any] = {
        "sources": {"cache": rows},
        "batch_size": BATCH,
        "start_id": cache.start_id,
        "all_rows": RowOrder(None, len(rows), seed=2),
    }
    return InputPipeline(**{**settings, **changed})


def assert_rows(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], names: dict[str, str]
) -> None:
    assert got.keys() == names.keys()
    for theirs, ours in names.items():
        np.testing.assert_array_equal(got[theirs], want[ours], err_msg=theirs)
        assert got[theirs].dtype == want[ours].dtype


def test_stage_1_has_the_rows_and_labels_of_salt_train(
    cache: PackedCache, labels: str, batches: Any
) -> None:
    rows = PackedRows(str(cache.path), BATCH, seed=2, soft_labels=labels, loss=LOSS)
    want = pipeline(cache, stage1_steps=99, soft_labels=StoredLabels.open(labels))
    found = batches(rows, 12)  # more than an epoch of 48 rows
    for step, batch in enumerate(found):
        assert_rows(batch, want.batch(step), NAMES | LABELS)
    # A row's own weights: they are no matter of the ids.
    assert not found[0]["decoder_loss_weights"][:, 0].any()


def test_stage_2_goes_on_at_its_step(cache: PackedCache, batches: Any) -> None:
    found = batches(PackedRows(str(cache.path), BATCH, seed=2, first_step=7), 4)
    for step, batch in enumerate(found, start=7):
        assert_rows(batch, pipeline(cache).batch(step), NAMES)


def test_stage_1_of_salt_ds_reads_the_selection(
    cache: PackedCache, selection: Selection, batches: Any, tmp_path: pathlib.Path
) -> None:
    stored = write_labels(tmp_path / "labels", cache, selection)
    rows = PackedRows(
        str(cache.path), BATCH, 2, 1, soft_labels=stored, selection=str(selection.path), loss=LOSS
    )
    want = pipeline(
        cache,
        selected_rows=RowOrder(selection.row_ids, 0, seed=2),
        stage1_steps=99,
        soft_labels=StoredLabels.open(stored),
    )
    for step, batch in enumerate(batches(rows, 3), start=1):
        assert_rows(batch, want.batch(step), NAMES | LABELS)


def test_validation_is_every_row_once_without_labels(
    cache: PackedCache, labels: str, batches: Any
) -> None:
    rows = PackedRows(str(cache.path), 2, soft_labels=labels, loss=LOSS)
    found = batches(rows, 99, split="validation")
    assert all(batch.keys() == NAMES.keys() for batch in found)
    targets = np.concatenate([batch["decoder_target_tokens"] for batch in found])
    split = cache.split("validation")
    np.testing.assert_array_equal(
        targets, [row["targets"] for row in split.__getitems__(range(10))]
    )


def test_the_vocabulary_is_the_models(cache: PackedCache, batches: Any) -> None:
    """T5X compares them, and registers nothing twice."""
    rows = PackedRows(str(cache.path), BATCH)
    batches(rows, 1)
    task = seqio.TaskRegistry.get(register("tested_rows", PackedRows(str(cache.path), BATCH)))
    vocabulary = packed_rows.vocabulary(str(cache.path))
    assert vocabulary.vocab_size == cache.vocabulary_size
    used = [task.output_features[name].vocabulary for name in list(NAMES)[:2]]
    assert used == [vocabulary, vocabulary]
    others = {*NAMES, *LABELS} - set(list(NAMES)[:2])
    for name in others:
        feature = task.output_features[name]
        assert isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        assert feature.required == (name in NAMES)


def refused(words: str, cache: PackedCache, **settings: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        register(
            "refused_rows", PackedRows(**{"cache": str(cache.path), "batch_size": 2} | settings)
        )
    assert "\n" not in str(caught.value)
    assert "refused_rows" not in seqio.TaskRegistry.names()


def test_refusals(
    cache: PackedCache,
    labels: str,
    selection: Selection,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
) -> None:
    refused("temperature 0.5 and LossConfig.teacher_temperature is 0.25", cache, soft_labels=labels)
    other = make_cache(seed=1)
    refused("belong to the cache .* expected the cache", other, soft_labels=labels, loss=LOSS)
    refused("belongs? to the cache", other, selection=str(selection.path))
    few = write_labels(tmp_path / "few", cache, selection)
    refused("stage 1 reads all rows: .* or label all rows", cache, soft_labels=few, loss=LOSS)
    more = dataclasses.replace(LOSS, teacher_top_k=K + 1)
    refused("teacher_top_k is 4 and .* have 3 ids", cache, soft_labels=labels, loss=more)
    held_out = write_labels(tmp_path / "held_out", cache, split="validation")
    refused("of the validation split, not train", cache, soft_labels=held_out, loss=LOSS)
    refused("does not exist", cache, soft_labels=str(tmp_path / "none"))
    refused("batch_size is 0", cache, batch_size=0)
    refused("first_step is -1", cache, first_step=-1)
    refused("seed is 0.5", cache, seed=0.5)


def test_id_0_must_be_padding_alone(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """T5X's networks see no target of id 0."""
    vocabulary = ByteVocabulary()
    row = make_row(np.arange(4), np.ones(4), np.ones(4, int))
    assert row.keys() == ROW_DTYPES.keys()
    write_rows(tmp_path, {"train": [row]}, vocabulary=vocabulary, sequence_length=4)
    for name, value in (("eos_id", 0), ("pad_id", 7)):
        with monkeypatch.context() as patch:
            opened = PackedCache.open(tmp_path)
            patch.setattr(opened.vocabulary, name, value)
            patch.setattr(PackedCache, "open", lambda path, opened=opened: opened)
            with pytest.raises(InputError, match="T5X takes id 0 for padding"):
                register("refused_rows", PackedRows(str(tmp_path), 1))
