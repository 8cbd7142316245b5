"""The registered tasks: one import name, environment variables, the 22 names."""

import json
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds
import zstandard

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.errors import InputError
from salt_jax.preparation.pile import PILE_DOCUMENT_RATES, PILE_SUBSETS
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.t5x.seqio_documents import task_corpus
from salt_jax.t5x.text_tasks import TextFilesSource
from salt_jax.t5x.the_pile.the_pile import ThePile
from salt_jax.tasks import environment, pile, smoke

VARIABLES = ["TEXT", "VOCABULARY", "CACHE", "SELECTION", "SCORES"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable set, and nothing remembered from a use of the task by another test."""
    for variable in VARIABLES:
        monkeypatch.delenv(f"SALT_{variable}", raising=False)
    assert isinstance(smoke.SMOKE_TEXT.source, TextFilesSource)
    monkeypatch.setattr(smoke.SMOKE_TEXT.source, "_given", smoke.SMOKE_TEXT.source._given)
    for task in (pile.PILE, smoke.SMOKE_TEXT):
        for feature, field in (("targets", "_vocabulary"), ("subset", "_names")):
            vocabulary = task.output_features[feature].vocabulary
            monkeypatch.setattr(vocabulary, field, getattr(vocabulary, field))


def test_all_are_registered():
    names = {"pile", "pile_salt_ds", "smoke_text", "smoke_salt_ds"}
    assert names <= set(seqio.TaskRegistry.names())


@pytest.fixture
def the_pile(tmp_path):
    """A release of a few documents, and where TFDS keeps its datasets."""
    release = {
        "train/00": [("a", "ArXiv"), ("b", "Github"), ("c", "ArXiv")],
        "train/01": [("d", "Wikipedia (en)"), ("e", "ArXiv")],
        "val": [("f", "Github")],
        "test": [("g", "ArXiv")],
    }
    (tmp_path / "train").mkdir()
    for name, documents in release.items():
        rows = [{"text": text, "meta": {"pile_set_name": subset}} for text, subset in documents]
        lines = "\n".join(map(json.dumps, rows)).encode()
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    seqio.set_tfds_data_dir_override(str(tmp_path / "tfds"))
    for task in [pile.PILE, *pile.PILE_MIXTURE.tasks]:
        task.source.tfds_dataset._data_dir_override = None  # remembered from another test
    yield tmp_path
    seqio.set_tfds_data_dir_override(None)


def _build(folder, config):
    builder = ThePile(config=config, data_dir=str(folder / "tfds"), file_format="tfrecord")
    manual = tfds.download.DownloadConfig(manual_dir=str(folder))
    builder.download_and_prepare(download_config=manual)
    return builder


def _read(name, split):
    names = pile.PILE.output_features["subset"].vocabulary.names
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split, shuffle=False)
    return [
        (environment.chosen_vocabulary().decode(example["targets"]), names[example["subset"]])
        for example in dataset.as_numpy_iterator()
    ]


def test_the_pile_as_a_tfds_dataset(the_pile):
    builder = _build(the_pile, "all")
    assert builder.info.splits["train"].shard_lengths == [3, 2]
    assert builder.info.features["subset"].names == list(PILE_SUBSETS)
    assert sorted(_read("pile", "train")) == [
        ("a", "ArXiv"),
        ("b", "Github"),
        ("c", "ArXiv"),
        ("d", "Wikipedia (en)"),
        ("e", "ArXiv"),
    ]
    assert _read("pile", "validation") == [("f", "Github")]
    assert pile.PILE.output_features["subset"].vocabulary.vocab_size == 22
    _build(the_pile, "arxiv")
    assert sorted(_read("pile_arxiv", "train")) == [(t, "ArXiv") for t in "ace"]
    corpus = task_corpus(RegisteredTask("pile"))
    assert [unit.name for unit in corpus.units if unit.split == "train"] == [
        "train-00000",
        "train-00001",
    ]
    files = [source.path for unit in corpus.units for source in unit.sources(ReadingLog())]
    assert len(files) == len(corpus.units)
    assert sorted(files) == sorted(map(str, pathlib.Path(builder.data_path).glob("*.tfrecord*")))


def test_a_bad_release_builds_no_dataset(the_pile):
    (the_pile / "train" / "00.jsonl.zst").unlink()
    with pytest.raises(InputError, match="shard 00 is missing"):
        _build(the_pile, "all")


def test_the_pile_that_was_not_built(the_pile):
    with pytest.raises(InputError, match="build its dataset first"):
        task_corpus(RegisteredTask("pile"))


def test_the_mixture_has_the_published_shares():
    assert len(pile.PILE_MIXTURE.tasks) == 22
    # The paper's mean document has 5.91 KiB, and its shares add up to the whole.
    assert 1 / sum(PILE_DOCUMENT_RATES.values()) == pytest.approx(5.91, abs=0.01)
    rates = {task.name: pile.PILE_MIXTURE.get_rate(task) for task in pile.PILE_MIXTURE.tasks}
    assert rates["pile_wikipedia_en"] * 1.11 == pytest.approx(0.0153)
    assert rates["pile_gutenberg_pg_19"] == PILE_DOCUMENT_RATES["Gutenberg (PG-19)"]


def test_smoke_text_reads_ones_own_files(monkeypatch, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.md").write_text(f"note {number}\n")
    monkeypatch.setenv("SALT_TEXT", f"{tmp_path}/*.md")
    task = seqio.get_mixture_or_task("smoke_text")
    texts = {
        split: [
            example["targets_pretokenized"].decode()
            for example in task.get_dataset(None, split, shuffle=False).as_numpy_iterator()
        ]
        for split in ("train", "validation", "test")
    }
    assert sorted(sum(texts.values(), [])) == sorted(f"note {n}\n" for n in range(40))  # noqa: RUF017
    assert len(texts["train"]) > 30


def test_selected_rows_by_environment(monkeypatch, tmp_path, cache: PackedCache, write_scores):
    common = {"cache_digest": cache.digest, "split": "train"}
    rows = len(cache.split("train"))
    scores = write_scores(tmp_path / "scores", np.ones(rows), **common)
    Selection.write(tmp_path / "selection", np.array([1, 5]), how={}, scores=scores, **common)
    with pytest.raises(InputError, match="SALT_CACHE is not set"):
        seqio.get_mixture_or_task("smoke_salt_ds").get_dataset(None, "train", shuffle=False)
    monkeypatch.setenv("SALT_CACHE", str(cache.path))
    monkeypatch.setenv("SALT_SELECTION", str(tmp_path / "selection"))
    monkeypatch.setenv("SALT_SCORES", str(tmp_path / "scores"))
    dataset = seqio.get_mixture_or_task("smoke_salt_ds").get_dataset(None, "train", shuffle=False)
    examples = list(dataset.as_numpy_iterator())
    assert [(int(e["row_id"]), float(e["slm_score"])) for e in examples] == [(1, 1.0), (5, 1.0)]
    everything = seqio.get_mixture_or_task("smoke_scored").get_dataset(None, "train", shuffle=False)
    ids = [int(example["row_id"]) for example in everything.as_numpy_iterator()]
    assert ids == list(range(rows))
    write_scores(tmp_path / "several", np.ones(rows), ks=(1, 2), **common)
    monkeypatch.setenv("SALT_SCORES", str(tmp_path / "several"))
    monkeypatch.setenv("SALT_SCORE_K", "3")
    with pytest.raises(InputError, match="k is 3, and the scores are of k = 1, 2"):
        environment.scored_rows().dataset("train", shuffle_files=False)


def test_vocabularies_by_environment(monkeypatch, cache: PackedCache, tmp_path):
    monkeypatch.setenv("SALT_VOCABULARY", str(cache.path / "vocabulary"))
    assert environment.chosen_vocabulary() == cache.vocabulary
    monkeypatch.setenv("SALT_VOCABULARY", str(tmp_path / "none.model"))
    with pytest.raises(InputError, match=r"none\.model cannot be read"):
        environment.chosen_vocabulary()
