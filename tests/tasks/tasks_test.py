"""The registered tasks: one import name, environment variables, the 22 names."""

import json

import numpy as np
import pytest
import seqio
import zstandard

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.errors import InputError
from salt_jax.preparation.text_tasks import TextFilesSource
from salt_jax.tasks import environment, pile, smoke

VARIABLES = ["PILE", "TEXT", "VOCABULARY", "CACHE", "SELECTION", "SCORES"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable set, and nothing remembered from a use of the task by another test."""
    for variable in VARIABLES:
        monkeypatch.delenv(f"SALT_{variable}", raising=False)
    for task in (pile.PILE, smoke.SMOKE_TEXT):
        assert isinstance(task.source, TextFilesSource)
        monkeypatch.setattr(task.source, "_given", task.source._given)
        for feature, field in (("targets", "_vocabulary"), ("subset", "_names")):
            vocabulary = task.output_features[feature].vocabulary
            monkeypatch.setattr(vocabulary, field, getattr(vocabulary, field))


def test_all_are_registered():
    names = {"pile", "pile_salt_ds", "smoke_text", "smoke_salt_ds"}
    assert names <= set(seqio.TaskRegistry.names())


def test_the_pile(monkeypatch, tmp_path):
    (tmp_path / "train").mkdir()
    for name, subset in (("train/00", "ArXiv"), ("val", "Github"), ("test", "Books4")):
        line = json.dumps({"text": name, "meta": {"pile_set_name": subset}}).encode()
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(line))
    monkeypatch.setenv("SALT_PILE", str(tmp_path))
    task = seqio.get_mixture_or_task("pile")
    (example,) = task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()
    assert example["targets"].tolist() == [*environment.vocabulary().encode("val"), 1]
    assert task.output_features["subset"].vocabulary.names[example["subset"]] == "Github"
    assert task.output_features["subset"].vocabulary.vocab_size == 22


def test_the_pile_without_its_folder():
    with pytest.raises(InputError, match="SALT_PILE is not set"):
        seqio.get_mixture_or_task("pile").get_dataset(None, "train", shuffle=False)


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


def test_selected_rows_by_environment(monkeypatch, tmp_path, cache: PackedCache):
    common = {"cache_digest": cache.digest, "split": "train"}
    rows = len(cache.split("train"))
    scores = RowScores.write(tmp_path / "scores", np.ones(rows), scorer={}, score={}, **common)
    Selection.write(tmp_path / "selection", np.array([1, 5]), how={}, scores=scores, **common)
    with pytest.raises(InputError, match="SALT_CACHE is not set"):
        seqio.get_mixture_or_task("smoke_salt_ds").get_dataset(None, "train", shuffle=False)
    monkeypatch.setenv("SALT_CACHE", str(cache.path))
    monkeypatch.setenv("SALT_SELECTION", str(tmp_path / "selection"))
    monkeypatch.setenv("SALT_SCORES", str(tmp_path / "scores"))
    dataset = seqio.get_mixture_or_task("smoke_salt_ds").get_dataset(None, "train", shuffle=False)
    examples = list(dataset.as_numpy_iterator())
    assert [(int(e["row_id"]), float(e["slm_score"])) for e in examples] == [(1, 1.0), (5, 1.0)]


def test_vocabularies_by_environment(monkeypatch, cache: PackedCache, tmp_path):
    monkeypatch.setenv("SALT_VOCABULARY", str(cache.path / "vocabulary"))
    assert environment.vocabulary() == cache.vocabulary
    monkeypatch.setenv("SALT_VOCABULARY", str(tmp_path / "none.model"))
    with pytest.raises(InputError, match=r"none\.model cannot be read"):
        environment.vocabulary()
