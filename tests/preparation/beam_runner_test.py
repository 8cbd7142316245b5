"""Beam: the same jobs, the same bytes, the same sentences."""

import json

import pytest

from salt_jax.commands.prepare import prepare
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError, RunFailed
from salt_jax.preparation import mapping
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder
from tests.run_settings import prepare_settings

from .conftest import files_of

pytest.importorskip("apache_beam", reason="Apache Beam has its own environment (docs/data.md)")


def _prepare(folder, corpus, **settings):
    task = TextFiles(train=f"{corpus}/train/*", validation=f"{corpus}/val.jsonl")
    settings = {"sequence_length": 32, "shards": 3, **settings}
    settings = prepare_settings(task=task, vocabulary=ByteVocabulary(), **settings)
    prepare(RunFolder(folder, "prepare"), **settings)
    return files_of(folder)


@pytest.fixture(autouse=True)
def _each_file_by_itself(monkeypatch):
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)


@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_beam_gives_the_same_bytes(make_corpus, tmp_path, mode):
    corpus = make_corpus()
    options = (f"--direct_running_mode={mode}", "--direct_num_workers=2")
    beam = _prepare(tmp_path / "beam", corpus, runner="DirectRunner", beam_options=options)
    assert beam == _prepare(tmp_path / "local", corpus, workers=1)


def test_bad_text_and_a_start_on_another_runner(make_corpus, tmp_path):
    corpus = make_corpus()
    expected = _prepare(tmp_path / "straight", corpus, workers=1)
    good = (corpus / "train" / "1.jsonl").read_text()
    (corpus / "train" / "1.jsonl").write_text(good + json.dumps({"texts": ""}))
    for runner in ("DirectRunner", "local"):
        with pytest.raises(InputError, match=r"1\.jsonl, line 44: .* no `text`") as caught:
            _prepare(tmp_path / "cache", corpus, runner=runner)
        assert "4 of 5 parts of the text are finished and kept" in str(caught.value)
        assert "\n" not in str(caught.value)
    (corpus / "train" / "1.jsonl").write_text(good)
    assert _prepare(tmp_path / "cache", corpus, runner="DirectRunner") == expected


def test_a_full_disk_keeps_its_name(make_corpus, tmp_path, monkeypatch):
    def full(self, *document):
        raise OSError(28, "No space left on device", "the.part")

    monkeypatch.setattr(mapping.PartWriter, "add", full)
    with pytest.raises(OSError, match="No space left") as caught:
        _prepare(tmp_path / "cache", make_corpus(), runner="DirectRunner")
    assert (caught.value.errno, caught.value.filename) == (28, "the.part")


def test_a_runner_that_beam_does_not_have(make_corpus, tmp_path):
    corpus = make_corpus()
    with pytest.raises(InputError, match=r"Beam cannot start the runner 'no\.such\.Runner'"):
        _prepare(tmp_path / "cache", corpus, runner="no.such.Runner")


def test_a_pipeline_that_fails(make_corpus, tmp_path, monkeypatch):
    def broken(self, *document):
        raise RuntimeError("something\nof many lines")

    monkeypatch.setattr(mapping.PartWriter, "add", broken)
    with pytest.raises(RunFailed, match="Beam's pipeline failed"):
        _prepare(tmp_path / "cache", make_corpus(), runner="DirectRunner")
