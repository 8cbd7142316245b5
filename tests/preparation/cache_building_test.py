"""Building a cache: the same bytes whoever does the work, and nothing made twice."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from salt_jax.commands.prepare import prepare
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError, RunFailed
from salt_jax.preparation import cache_building, mapping, merging
from salt_jax.preparation.packing import PACKINGS
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary
from salt_jax.storage.run_folder import RunFolder
from tests.run_settings import prepare_settings

from .conftest import files_of

MINIPILE = pathlib.Path(__file__).parents[2].joinpath("../shared/data/minipile").resolve()


def _files(folder, **changes):
    return TextFiles(train=f"{folder}/train/*", validation=f"{folder}/val.jsonl", **changes)


def _prepare(folder, task, **settings):
    defaults = {"vocabulary": ByteVocabulary(), "sequence_length": 32, "shards": 3, "workers": 1}
    settings = prepare_settings(task=task, **{**defaults, **settings})
    prepare(RunFolder(folder, "prepare"), **settings)
    return PackedCache.open(folder)


def _texts(cache, split):
    """The split's documents, packed whole into rows that hold any of them."""
    return [
        cache.vocabulary.decode(row["targets"][row["segment_ids"] == segment])
        for row in cache.split(split)
        for segment in range(1, row["segment_ids"].max() + 1)
    ]


def _lines(*paths):
    return [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("packing", PACKINGS)
def test_workers_and_grouping_change_no_byte(make_corpus, tmp_path, monkeypatch, packing):
    files = _files(make_corpus(), subsets=("code", "prose"))
    alone = _prepare(tmp_path / "alone", files, packing=packing)
    together = _prepare(tmp_path / "together", files, packing=packing, workers=2)
    assert files_of(alone.path) == files_of(together.path)
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)  # each file by itself
    monkeypatch.setattr("salt_jax.preparation.part_files._LEAST_BLOCK_BYTES", 1000)
    monkeypatch.setattr("salt_jax.preparation.part_files._SLICE_BYTES", 0)
    for workers in (1, 2):
        folder = tmp_path / f"by files, {workers}"
        assert files_of(_prepare(folder, files, packing=packing, workers=workers).path) == (
            files_of(alone.path)
        )
    assert not (alone.path / "work").exists()


def test_every_document_is_in_one_bucket_of_its_split(make_corpus, tmp_path):
    corpus = make_corpus()
    settings = {"packing": "whole_documents", "sequence_length": 512}
    cache = _prepare(tmp_path / "cache", _files(corpus), shards=4, **settings)
    held_out = _lines(corpus / "val.jsonl")
    train = [t for t in _lines(*sorted((corpus / "train").iterdir())) if t not in held_out]
    assert sorted(_texts(cache, "train")) == sorted(train)
    assert sorted(_texts(cache, "validation")) == sorted(held_out)
    info = cache.manifest["splits"]["train"]
    assert len(info["shards"]) == 4
    assert info["shared_documents"] == 4
    # Each file repeats two texts, and the first file one that it has twice itself.
    assert info["duplicate_documents"] == len(train) - len(set(train)) == 8
    assert info["bytes"] == sum(len(text.encode()) for text in train)
    for name in ("documents", "bytes", "duplicate_documents", "shared_documents"):
        assert info[name] == sum(counts[name] for counts in info["by_subset"].values())


def test_duplicates_are_dropped_where_asked_and_the_first_is_kept(make_corpus, tmp_path, capsys):
    corpus = make_corpus()
    settings = {"packing": "whole_documents", "sequence_length": 512, "shards": 2}
    _prepare(tmp_path / "with", _files(corpus), **settings)
    assert "Kept 8 documents of train" in capsys.readouterr().out
    cache = _prepare(tmp_path / "without", _files(corpus), drop_duplicates=True, **settings)
    assert "Left out 8 documents of train" in capsys.readouterr().out
    texts = _texts(cache, "train")
    train = _lines(*sorted((corpus / "train").iterdir()))
    assert sorted(texts) == sorted(set(train) - set(_lines(corpus / "val.jsonl")))
    info = cache.manifest["splits"]["train"]
    assert (info["documents"], info["duplicate_documents"]) == (len(texts), 8)
    summary = json.loads((cache.path / "summary.json").read_text())
    of_code = summary["splits"]["train"]["by_subset"]["code"]
    assert of_code["duplicate_documents"] == info["by_subset"]["code"]["duplicate_documents"] > 0


def test_of_equal_texts_the_first_gives_the_subset(tmp_path):
    for number, name in enumerate("ba"):
        row = {"text": "equal", "subset": name}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    files = TextFiles(train=f"{tmp_path}/*.jsonl")
    cache = _prepare(tmp_path / "cache", files, drop_duplicates=True)
    counts = cache.manifest["splits"]["train"]["by_subset"]
    assert {name: count["documents"] for name, count in counts.items()} == {"b": 1, "a": 0}
    assert cache.subsets[cache.split("train")[0]["subset"]] == "b"


def test_more_shards_than_documents(make_corpus, tmp_path):
    corpus = make_corpus(files=1, documents=6)
    settings = {"packing": "whole_documents", "sequence_length": 512}
    cache = _prepare(tmp_path / "cache", _files(corpus), shards=50, **settings)
    shards = cache.manifest["splits"]["train"]["shards"]
    assert 1 < len(shards) < 9
    assert sum(shard["rows"] for shard in shards) == len(cache.split("train"))
    assert [int(row["row_id"]) for row in cache.split("train")] == list(range(len(shards)))
    cache.verify()
    assert len(_texts(cache, "train")) == 8
    assert _prepare(tmp_path / "one", _files(corpus), shards=1, **settings).split_names


def test_held_out_splits_get_shards_by_their_text(make_corpus, tmp_path):
    corpus = make_corpus(files=2)
    fractions = TextFiles(train=f"{corpus}/train/*", validation_fraction=0.5, test_fraction=0.02)
    cache = _prepare(tmp_path / "cache", fractions, shards=8)
    counts = {name: len(info["shards"]) for name, info in cache.manifest["splits"].items()}
    assert counts == {"train": 8, "validation": 8, "test": 1}


def test_finished_parts_are_not_made_again(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    corpus = make_corpus()
    expected = files_of(_prepare(tmp_path / "straight", _files(corpus)).path)
    folder, calls = tmp_path / "cache", []

    class Stopped(BaseException):
        """What no handler takes for an error."""

    def counted(function, stop):
        def run(job):
            calls.append((function.__name__, getattr(job, "unit", job)))
            if len(calls) == stop:
                raise Stopped
            return function(job)

        return run

    for stop in (3, 3, 4, 2, 0):
        before = len(calls)
        monkeypatch.setattr(cache_building, "map_unit", counted(mapping.map_unit, before + stop))
        monkeypatch.setattr(
            cache_building, "merge_bucket", counted(merging.merge_bucket, before + stop)
        )
        if stop:
            with pytest.raises(Stopped):
                _prepare(folder, _files(corpus))
            with pytest.raises(InputError):
                PackedCache.open(folder)
    _prepare(folder, _files(corpus))
    assert files_of(folder) == expected
    # 5 parts and 4 shards, and the four that were stopped.
    assert len(calls) == 5 + 4 + 4


def _first_alone(job):
    """Merges a split's first bucket and fails at the next."""
    if job.index:
        raise RuntimeError
    return merging.merge_bucket(job)


@pytest.mark.parametrize(
    ("change", "keeps_parts"),
    [
        ({"sequence_length": 64}, True),
        ({"seed": 1, "drop_duplicates": True}, True),
        ({"vocabulary": TrainedVocabulary(size=300)}, False),
        ({"shards": 4}, False),
    ],
)
def test_other_settings_keep_what_does_not_depend_on_them(
    make_corpus, tmp_path, monkeypatch, change, keeps_parts
):
    corpus, folder = make_corpus(), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "merge_bucket", _first_alone)
        with pytest.raises(RuntimeError):
            _prepare(folder, _files(corpus))
    fresh = _prepare(tmp_path / "fresh", _files(corpus), **change)
    if keeps_parts:
        monkeypatch.setattr(cache_building, "map_unit", None)
    assert files_of(_prepare(folder, _files(corpus), **change).path) == files_of(fresh.path)


@pytest.mark.parametrize("vocabulary", [ByteVocabulary(), TrainedVocabulary(size=300)])
def test_a_file_that_changed_is_read_again_and_named(
    make_corpus, tmp_path, monkeypatch, capsys, vocabulary
):
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    corpus, folder = make_corpus(), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "merge_bucket", _first_alone)
        with pytest.raises(RuntimeError):
            _prepare(folder, _files(corpus), vocabulary=vocabulary)
    assert (folder / "work" / "rows-train-0.json").exists()
    capsys.readouterr()
    with open(corpus / "train" / "1.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more", "subset": "code"}))
    cache = _prepare(folder, _files(corpus), vocabulary=vocabulary)
    printed = capsys.readouterr().out
    if isinstance(vocabulary, ByteVocabulary):
        assert f"{corpus}/train/1.jsonl changed since it was read: it is read again." in printed
        assert "[parts of the text] 4 are finished, 1 are left." in printed
    else:
        assert "Training a bpe vocabulary" in printed  # on what the files hold now
    fresh = _prepare(tmp_path / "fresh", _files(corpus), vocabulary=vocabulary)
    assert files_of(cache.path) == files_of(fresh.path)


def test_a_trained_vocabulary_is_not_trained_again(make_corpus, tmp_path, monkeypatch, capsys):
    corpus, folder = make_corpus(), tmp_path / "cache"
    settings = {"vocabulary": TrainedVocabulary(size=300)}
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "map_unit", None)
        with pytest.raises(TypeError):
            _prepare(folder, _files(corpus), **settings)
    assert "Training a bpe vocabulary" in capsys.readouterr().out
    cache = _prepare(folder, _files(corpus), **settings)
    assert "Training" not in capsys.readouterr().out
    fresh = _prepare(tmp_path / "fresh", _files(corpus), **settings)
    assert files_of(cache.path) == files_of(fresh.path)


def test_work_of_another_version_is_made_again_with_a_sentence(
    make_corpus, tmp_path, monkeypatch, capsys
):
    corpus, folder = make_corpus(), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "merge_bucket", None)
        with pytest.raises(TypeError):
            _prepare(folder, _files(corpus))
    plan = json.loads((folder / "work" / "plan.json").read_text())
    (folder / "work" / "plan.json").write_text(json.dumps({**plan, "units": "d" * 64}))
    capsys.readouterr()
    cache = _prepare(folder, _files(corpus))
    assert f"{folder / 'work'} is from other settings or another version" in capsys.readouterr().out
    assert files_of(cache.path) == files_of(_prepare(tmp_path / "fresh", _files(corpus)).path)


@pytest.mark.parametrize("changed", [{"max_documents": 30}, {"validation_fraction": 0.3}])
def test_a_vocabulary_of_other_text_is_trained_anew(
    make_corpus, tmp_path, monkeypatch, capsys, changed
):
    corpus, folder = make_corpus(), tmp_path / "cache"
    settings = {"vocabulary": TrainedVocabulary(size=300)}
    other = TextFiles(train=f"{corpus}/train/*.jsonl", **changed)
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "map_unit", None)
        with pytest.raises(TypeError):
            _prepare(folder, other, **settings)
    capsys.readouterr()
    _prepare(folder, TextFiles(train=f"{corpus}/train/*.jsonl"), **settings)
    assert "Training a bpe vocabulary" in capsys.readouterr().out


def test_a_text_of_validation_files_that_is_held_out_for_test_is_left_out(tmp_path):
    texts = [f"document {i} has words" for i in range(60)]
    for name, some in (("train", texts), ("validation", texts[::2])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = TextFiles(
        train=f"{tmp_path}/train.jsonl",
        validation=f"{tmp_path}/validation.jsonl",
        test_fraction=0.3,
    )
    cache = _prepare(tmp_path / "cache", files)
    info = {name: cache.split(name).info for name in cache.split_names}
    in_both = set(texts[::2]) & {d.text for d in files.documents("test")}
    assert len(in_both) > 3
    assert info["validation"]["shared_documents"] == len(in_both)
    assert info["validation"]["documents"] == 30 - len(in_both)


def test_bad_text_keeps_what_is_finished_and_the_command_goes_on(
    make_corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    corpus = make_corpus()
    expected = files_of(_prepare(tmp_path / "straight", _files(corpus)).path)
    good = (corpus / "train" / "2.jsonl").read_text()
    (corpus / "train" / "2.jsonl").write_text(good + "{\n")
    folder = tmp_path / "cache"
    with pytest.raises(InputError, match=r"2\.jsonl, line 44: this is not JSON") as caught:
        _prepare(folder, _files(corpus))
    assert "; 2 of 5 parts of the text are finished and kept, and the same command resumes" in (
        str(caught.value)
    )
    assert "\n" not in str(caught.value)
    # Skipping malformed lines changes nothing in files that have none.
    first = (folder / "work" / "train-00000.part").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(cache_building, "merge_bucket", None)
        with pytest.raises(TypeError):
            _prepare(folder, _files(corpus), skip_broken_lines=True)
    assert (folder / "work" / "train-00000.part").stat().st_mtime_ns == first
    # But a file with skipped lines is refused again if they are not to be skipped.
    with pytest.raises(InputError, match=r"2\.jsonl, line 44: this is not JSON"):
        _prepare(folder, _files(corpus))
    (corpus / "train" / "2.jsonl").write_text(good)
    assert files_of(_prepare(folder, _files(corpus)).path) == expected


def test_an_error_in_another_process_is_the_same_sentence(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    corpus = make_corpus()
    for number in range(4):
        with open(corpus / "train" / f"{number}.jsonl", "a") as file:
            file.write("{")
    (corpus / "val.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"\.jsonl, line \d+: this is not JSON") as caught:
        _prepare(tmp_path / "cache", _files(corpus), workers=2)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def _killed(job):
    os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_is_told_and_the_rest_is_kept(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    corpus = make_corpus()
    monkeypatch.setattr(cache_building, "merge_bucket", _killed)
    with pytest.raises(RunFailed, match="a worker process was killed"):
        _prepare(tmp_path / "cache", _files(corpus), workers=2)
    work = tmp_path / "cache" / "work"
    assert all((work / f"train-0000{number}.json").exists() for number in range(4))


RUN = """
import pathlib, sys
from salt_jax.commands.prepare import prepare
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.preparation import corpora
from salt_jax.preparation.packing import Packing
from salt_jax.preparation.runners import JobRunner
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder

corpora._UNIT_TEXT_BYTES = 1
corpus, folder, shards, length, workers = sys.argv[1:]
files = TextFiles(train=f"{corpus}/train/*", validation=f"{corpus}/val.jsonl")
prepare(RunFolder(pathlib.Path(folder), "prepare"), task=files, vocabulary=ByteVocabulary(),
        rows=Packing(sequence_length=int(length), shards=int(shards)),
        jobs=JobRunner(workers=int(workers)))
"""


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(make_corpus, tmp_path):
    corpus = make_corpus(files=12, documents=400)
    shutil.copy(corpus / "train" / "0.jsonl", corpus / "train" / "a.jsonl")
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-c", RUN, str(corpus)]
    subprocess.run([*command, str(straight), "6", "32", "2"], check=True, capture_output=True)
    rng, finished = random.Random(0), {}
    for _ in range(7):
        process = subprocess.Popen(
            [*command, str(folder), "6", "32", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # One to three parts or shards further, and a moment into the next.
        target = len(finished) + rng.randint(1, 3)
        while process.poll() is None and len(_finished(folder)) < target:
            _wait(process, 0.002)
        _wait(process, rng.uniform(0, 0.05))
        process.kill()
        process.communicate()  # until the workers, which have its pipes too, are gone
        if (folder / "COMPLETED").exists():
            break
        with pytest.raises(InputError):
            PackedCache.open(folder)
        assert _finished(folder).items() >= finished.items(), "what was finished was made again"
        finished = _finished(folder)
    assert len(finished) >= 7
    subprocess.run([*command, str(folder), "6", "32", "2"], check=True, capture_output=True)
    assert files_of(folder) == files_of(straight)


def _finished(folder):
    """Records of parts and shards that are finished, by the file each one is."""
    if not (folder / "work").exists():
        return {}
    names = {entry.name: entry.inode() for entry in os.scandir(folder / "work")}
    return {name: inode for name, inode in names.items() if re.fullmatch(r".*-\d+\.json", name)}


def _wait(process, seconds):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


# The kernel's own count starts anew with a program; that of getrusage starts at pytest's.
MEASURED = (
    RUN
    + """
status = pathlib.Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""
)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_corpus(make_corpus, tmp_path):
    """Four times the text in four times the shards: a cache that held it would take 48 MB more.

    The less of the two fills every buffer already: below it, memory does grow.
    """
    peaks = {}
    for times in (4, 16):
        corpus = make_corpus(files=1, documents=20, name=f"corpus {times}")
        with open(corpus / "train" / "0.jsonl", "a") as file:
            for number in range(40 * times):
                text = f"{number} " + "word " * 20_000
                file.write(json.dumps({"text": text, "subset": "prose"}) + "\n")
        command = [sys.executable, "-c", MEASURED, str(corpus), str(tmp_path / f"{times}")]
        result = subprocess.run(
            [*command, str(4 * times), "1024", "1"], capture_output=True, text=True, check=True
        )
        peaks[times] = int(result.stdout.split()[-1]) / 1000
        assert PackedCache.open(tmp_path / f"{times}").manifest["splits"]["train"]["bytes"] > (
            4e6 * times
        )
    assert peaks[16] < peaks[4] + 16, peaks


@pytest.mark.skipif(not MINIPILE.exists(), reason="the minipile corpus is not beside this checkout")
def test_two_workers_and_one_give_the_same_minipile(tmp_path):
    from salt_jax.preparation.pile import pile_files

    settings = {"sequence_length": 1280, "shards": 4}
    files = pile_files(str(MINIPILE))
    caches = [
        _prepare(tmp_path / str(workers), files, workers=workers, **settings) for workers in (1, 2)
    ]
    assert files_of(caches[0].path) == files_of(caches[1].path)
    assert caches[0].manifest["splits"]["train"]["documents"] > 3000
