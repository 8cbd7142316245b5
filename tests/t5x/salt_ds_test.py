"""Scored rows as SeqIO tasks, all of them and those selected, for T5X and other SeqIO users."""

import dataclasses

import numpy as np
import pytest
import seqio

from salt_jax.data.features import make_row
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.t5x.salt_ds import register_salt_ds, register_scored_rows
from tests.written_cache import write_rows

LENGTH, ROWS = 8, 100
SELECTED = [3, 10, 64, 99]
VOCABULARY = ByteVocabulary()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_scores):
    folder = tmp_path_factory.mktemp("salt_ds")
    rows = [
        make_row(
            np.array([*VOCABULARY.encode(f"{number:05}"), 1, 0, 0]),
            np.array([0, 1, 1, 1, 1, 1, 0, 0]),
            np.array([1] * 6 + [0] * 2),
            subset=number % 2,
        )
        for number in range(ROWS)
    ]
    write_rows(
        folder / "cache",
        {"train": rows},
        vocabulary=VOCABULARY,
        sequence_length=LENGTH,
        subsets=("even", "odd"),
    )
    digest = PackedCache.open(folder / "cache").digest
    common = {"cache_digest": digest, "split": "train"}
    # What the selection was made by is in a column of its own.
    columns = {"mean_k5": np.arange(ROWS, dtype=np.float32) / 10}
    scores = write_scores(
        folder / "scores", np.zeros(ROWS), ks=(3, 5), columns=columns, cache_digest=digest
    )
    Selection.write(
        folder / "selection",
        np.array(SELECTED),
        how={"rule": "x"},
        scores=scores,
        score=dataclasses.asdict(ScoreConfig(5, "mean")),
        **common,
    )
    return folder


@pytest.fixture
def task(folders):
    name = "tested_salt_ds"
    register_salt_ds(name, *(str(folders / part) for part in ("cache", "selection", "scores")))
    yield name
    seqio.TaskRegistry.remove(name)


def test_rows_scores_ids_and_subsets(task):
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, "train", shuffle=False)
    examples = list(dataset.as_numpy_iterator())
    assert [example["row_id"] for example in examples] == SELECTED
    np.testing.assert_allclose([e["slm_score"] for e in examples], [0.3, 1.0, 6.4, 9.9], rtol=1e-6)
    assert [example["subset"] for example in examples] == [1, 0, 0, 1]
    for example in examples:
        assert VOCABULARY.decode(example["targets"]) == f"{example['row_id']:05}"
        assert example["targets"][-1] == VOCABULARY.eos_id
        assert example["slm_score"].dtype == np.float32


def test_shuffled_by_seed(task):
    def ids(seed):
        dataset = seqio.get_mixture_or_task(task).get_dataset(
            None, "train", shuffle=True, seed=seed
        )
        return [int(example["row_id"]) for example in dataset.as_numpy_iterator()]

    assert sorted(ids(0)) == SELECTED
    assert ids(0) == ids(0)
    assert len({tuple(ids(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "converter", [seqio.DecoderFeatureConverter(pack=False), seqio.LMFeatureConverter(pack=False)]
)
def test_through_the_feature_converters_that_t5x_uses(task, converter):
    dataset = seqio.get_dataset(
        task,
        task_feature_lengths={"targets": LENGTH},
        feature_converter=converter,
        dataset_split="train",
        shuffle=False,
    )
    examples = list(dataset.as_numpy_iterator())
    assert len(examples) == len(SELECTED)
    targets = [*VOCABULARY.encode("00003"), 1, 0, 0]
    assert examples[0]["decoder_target_tokens"].tolist() == targets
    assert examples[0]["decoder_input_tokens"].tolist()[:6] == [0, *targets[:5]]
    assert examples[0]["decoder_loss_weights"].tolist() == [1] * 6 + [0] * 2


def test_all_rows_with_the_score_asked_for(folders):
    cache, scores = str(folders / "cache"), str(folders / "scores")
    register_scored_rows("tested_scored", cache, scores, k=5, statistic="mean")
    try:
        task = seqio.get_mixture_or_task("tested_scored")
        examples = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
        assert [int(example["row_id"]) for example in examples] == list(range(ROWS))
        np.testing.assert_allclose(
            [example["slm_score"] for example in examples], np.arange(ROWS) / 10, rtol=1e-6
        )
        for example in examples:
            assert VOCABULARY.decode(example["targets"]) == f"{example['row_id']:05}"
            assert example["subset"] == example["row_id"] % 2
        shuffled = task.get_dataset(None, "train", shuffle=True, seed=1).as_numpy_iterator()
        pairs = [(int(e["row_id"]), float(e["slm_score"])) for e in shuffled]
        assert [row for row, _ in pairs] != sorted(row for row, _ in pairs)
        assert sorted(pairs) == [(row, np.float32(row / 10)) for row in range(ROWS)]
        with pytest.raises(InputError, match=r"scores in .* are of the train split"):
            task.get_dataset(None, "validation", shuffle=False)
    finally:
        seqio.TaskRegistry.remove("tested_scored")
    register_scored_rows("tested_scored", cache, scores)
    try:
        with pytest.raises(InputError, match="scores are of k = 3, 5"):
            seqio.get_mixture_or_task("tested_scored").get_dataset(None, "train", shuffle=False)
    finally:
        seqio.TaskRegistry.remove("tested_scored")


def _fails(folders, words, *, split="train", **changes):
    parts = {part: str(folders / part) for part in ("cache", "selection", "scores")}
    register_salt_ds("failing_salt_ds", **{**parts, **changes})
    try:
        with pytest.raises(InputError, match=words):
            seqio.get_mixture_or_task("failing_salt_ds").get_dataset(None, split, shuffle=False)
    finally:
        seqio.TaskRegistry.remove("failing_salt_ds")


def test_bad_folders_are_named(folders, tmp_path, write_scores):
    _fails(folders, "does not exist", cache=str(tmp_path / "none"))
    _fails(folders, "expected a selection", selection=str(folders / "scores"))
    _fails(folders, "not of validation", split="validation")
    stranger = Selection.write(
        tmp_path / "selection", np.array([0]), cache_digest="c" * 64, split="train", how={}
    )
    _fails(folders, "belong to the cache cccc", selection=str(stranger.path))
    other = write_scores(tmp_path / "scores", np.zeros(3), cache_digest="b" * 64)
    _fails(folders, "belong to the cache bbbb", scores=str(other.path))


def test_scores_must_be_those_selected_from(folders, tmp_path, write_scores):
    digest = PackedCache.open(folders / "cache").digest
    common = {"cache_digest": digest, "split": "train"}
    write_scores(tmp_path / "scores", np.zeros(ROWS), **common)
    _fails(folders, "was made from the scores .*holds the scores", scores=f"{tmp_path}/scores")
    Selection.write(tmp_path / "random", np.array(SELECTED), how={"rule": "RandomRows"}, **common)
    register_salt_ds(
        "random_salt_ds", str(folders / "cache"), f"{tmp_path}/random", f"{tmp_path}/scores"
    )
    try:
        dataset = seqio.get_mixture_or_task("random_salt_ds").get_dataset(
            None, "train", shuffle=False
        )
        assert [int(e["row_id"]) for e in dataset.as_numpy_iterator()] == SELECTED
    finally:
        seqio.TaskRegistry.remove("random_salt_ds")


def test_a_random_control_has_no_score(folders):
    register_salt_ds("control", str(folders / "cache"), str(folders / "selection"))
    try:
        dataset = seqio.get_mixture_or_task("control").get_dataset(None, "train", shuffle=False)
        assert "slm_score" not in dataset.element_spec
    finally:
        seqio.TaskRegistry.remove("control")
