"""Documents of SeqIO tasks: the definition that text files without SeqIO are held against."""

import json
import os

import numpy as np
import pytest
import seqio
import tensorflow as tf

from salt_jax.commands.prepare import prepare
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.corpora import text_corpus
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary
from salt_jax.storage.run_folder import RunFolder
from salt_jax.t5x.seqio_documents import TaskUnit, find_task, subset_names, task_corpus
from salt_jax.t5x.text_tasks import register_text_task

VOCABULARY = ByteVocabulary(reserved=3)
TEXTS = [f"ab {number}\n\tné 🙂" * 3 for number in range(60)]


def _unit(split="train", task="mine"):
    return TaskUnit("", split, RegisteredTask(task))


@pytest.fixture
def path(tmp_path):
    rows = [{"text": text, "subset": "yx"[len(text) % 2]} for text in [*TEXTS, "", "half \ud83d"]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


@pytest.fixture(autouse=True)
def registered():
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize("trained", [False, True])
def test_text_files_without_seqio_give_what_the_task_gives(path, trained):
    vocabulary = TrainedVocabulary(size=330).train(TEXTS) if trained else VOCABULARY
    files = TextFiles(train=str(path), validation_fraction=0.2, test_fraction=0.1)
    register_text_task("mine", files, vocabulary)
    for split in files.splits:
        expected = list(_unit(split).documents(vocabulary, ReadingLog()))
        found = [
            document
            for unit in text_corpus(files).units
            for document in unit.documents(vocabulary, ReadingLog())
            if document.split == split
        ]
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours[1:] == theirs[1:]


def test_a_task_of_text_files_knows_its_sources(path):
    register_text_task("mine", TextFiles(train=str(path)), VOCABULARY)
    assert len(list(_unit().documents(VOCABULARY, ReadingLog()))) == len(TEXTS) + 1
    assert _unit().sources(ReadingLog()) == ReadingLog().sources([path])


def _ids_source(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_tensors({"targets": [100, 101, 1]})


def test_a_task_without_subsets_or_pretokenized_text():
    seqio.TaskRegistry.add(
        "theirs",
        source=seqio.FunctionDataSource(_ids_source, splits=["train"]),
        preprocessors=[],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    )
    task = find_task(RegisteredTask("theirs"))
    unit = _unit(task="theirs")
    (document,) = unit.documents(ByteVocabulary(), ReadingLog())
    assert (document.tokens.tolist(), document.text_bytes) == ([100, 101, 1], 2)
    assert subset_names(task) == (document.subset,) == ("theirs",)
    assert unit.sources(ReadingLog()) == []


@pytest.fixture
def lines(tmp_path):
    """A task over three files of lines."""
    for shard in range(3):
        lines = [f"{shard} {number}" for number in range(shard + 2)]
        (tmp_path / f"{shard}.txt").write_text("\n".join(lines))
    seqio.TaskRegistry.add(
        "lines",
        source=seqio.TextLineDataSource({"train": f"{tmp_path}/*.txt"}),
        preprocessors=[
            lambda ds: ds.map(lambda line: {"targets": line}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    )
    return RegisteredTask("lines")


def test_a_source_of_several_files_is_read_shard_by_shard(lines):
    corpus = task_corpus(lines)
    assert [unit.name for unit in corpus.units] == [f"train-0000{shard}" for shard in range(3)]
    texts = [
        [VOCABULARY.decode(d.tokens) for d in unit.documents(VOCABULARY, ReadingLog())]
        for unit in corpus.units
    ]
    assert texts == [[f"{s} {n}" for n in range(s + 2)] for s in range(3)]


def test_a_shard_knows_its_file_and_notices_that_it_changes(lines, tmp_path):
    units, log = task_corpus(lines).units, ReadingLog()
    for shard, unit in enumerate(units):
        assert unit.sources(log) == ReadingLog().sources([tmp_path / f"{shard}.txt"])
    documents = units[1].documents(VOCABULARY, log)
    next(documents)
    os.utime(tmp_path / "1.txt", ns=(0, 0))
    with pytest.raises(InputError, match=r"1\.txt changed while it was read"):
        units[1].sources(log)


def test_a_finished_cache_says_that_a_file_of_its_task_changed(lines, tmp_path):
    run = RunFolder(tmp_path / "cache", "prepare")
    prepare(run, task=lines)
    sources = PackedCache.open(run.path).manifest["sources"]
    assert [source["file"] for source in sources] == ["0.txt", "1.txt", "2.txt"]
    prepare(run, task=lines)
    (tmp_path / "2.txt").write_text("another")
    with pytest.raises(InputError, match=r"made when 2\.txt was another file"):
        prepare(run, task=lines)


def test_errors_keep_file_and_line_through_tensorflow(path):
    path.write_text(path.read_text() + '\n{"text": ')
    register_text_task("mine", TextFiles(train=str(path), subsets=("x", "y")), VOCABULARY)
    with pytest.raises(InputError, match=r"a\.jsonl, line 63: this is not JSON"):
        list(_unit().documents(VOCABULARY, ReadingLog()))


def test_a_task_that_nobody_registered():
    with pytest.raises(InputError, match="has no task 'none'"):
        find_task(RegisteredTask("none"))
    with pytest.raises(InputError, match=r"module no_such_module.*cannot be imported"):
        find_task(RegisteredTask("none", module="no_such_module"))


def test_ids_are_of_the_types_that_part_files_hold(path):
    files = TextFiles(train=str(path))
    (unit,) = text_corpus(files).units
    for reserved, dtype in ((3, np.uint16), (70_000, np.uint32)):
        document = next(unit.documents(ByteVocabulary(reserved), ReadingLog()))
        assert document.tokens.dtype == dtype
