"""Jobs of a plan that was given up, which end late."""

import pytest

from salt_jax.commands.prepare import prepare
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.preparation import cache_building, mapping, merging
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder
from tests.run_settings import prepare_settings

from .conftest import files_of


def _prepare(folder, corpus, **settings):
    task = TextFiles(train=f"{corpus}/train/*", validation=f"{corpus}/val.jsonl")
    defaults = {"vocabulary": ByteVocabulary(), "sequence_length": 32, "shards": 3, "workers": 1}
    settings = prepare_settings(task=task, **{**defaults, **settings})
    prepare(RunFolder(folder, "prepare"), **settings)
    return folder


def _first_alone(job):
    """Merges a split's first bucket and fails at the next."""
    if job.index:
        raise RuntimeError
    return merging.merge_bucket(job)


@pytest.mark.parametrize(
    ("settings", "left_by_another", "mapped_again"),
    [
        ({"vocabulary": ByteVocabulary(reserved=3)}, "train-00001.json", 1),
        ({"seed": 1}, "rows-train-0.json", 0),
    ],
)
def test_what_a_late_worker_of_another_plan_leaves_counts_for_nothing(
    make_corpus, tmp_path, monkeypatch, settings, left_by_another, mapped_again
):
    """Beam may go on with jobs of a pipeline that was given up."""
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    corpus, folder = make_corpus(), tmp_path / "cache"
    record = folder / "work" / left_by_another
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "merge_bucket", _first_alone)
        with pytest.raises(RuntimeError):
            _prepare(folder, corpus, **settings)
        others = record.read_bytes()
        with pytest.raises(RuntimeError):
            _prepare(folder, corpus)
    assert record.read_bytes() != others
    record.write_bytes(others)
    calls = []

    def counted(function):
        return lambda job: calls.append(function.__name__) or function(job)

    monkeypatch.setattr(cache_building, "map_unit", counted(mapping.map_unit))
    monkeypatch.setattr(cache_building, "merge_bucket", counted(merging.merge_bucket))
    _prepare(folder, corpus)
    assert calls == ["map_unit"] * mapped_again + ["merge_bucket"] * 4
    assert files_of(folder) == files_of(_prepare(tmp_path / "fresh", corpus))
