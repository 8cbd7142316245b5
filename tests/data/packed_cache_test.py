"""The packed cache: what goes in comes out by id; damage is refused by name."""

import dataclasses
import hashlib
import pathlib
import pickle

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.data.cache_shards import DocumentCounts, write_shard
from salt_jax.data.features import make_row
from salt_jax.data.packed_cache import PackedCache, begin_cache
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from tests.written_cache import write_rows

LENGTH = 12


def _rows(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for row_id in range(count):
        first, second = rng.integers(1, LENGTH // 2, 2)
        segment_ids_L = np.repeat([1, 2, 0], [first, second, LENGTH - first - second])
        rows.append(
            make_row(
                rng.integers(3, 259, LENGTH),
                (segment_ids_L > 0) & (rng.random(LENGTH) < 0.8),
                segment_ids_L,
                subset=int(rng.integers(2)),
                row_id=row_id,
            )
        )
    return rows


def _write(folder, rows, **settings):
    documents = {"code": DocumentCounts(4, 40, 1), "prose": DocumentCounts(3, 30, 0, 2)}
    return write_rows(
        folder,
        {"train": rows, "validation": rows[:3]},
        vocabulary=ByteVocabulary(),
        sequence_length=LENGTH,
        subsets=("code", "prose"),
        documents={"train": documents},
        **settings,
    )


def _same(row, expected):
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name].dtype == value.dtype, name
        np.testing.assert_array_equal(row[name], value, err_msg=name)


@pytest.mark.parametrize("shards", [1, 3, 100])
def test_rows_come_back_by_id(tmp_path, shards):
    rows = _rows(10)
    _write(tmp_path, rows, shards=shards)
    split = PackedCache.open(tmp_path).split("train")
    assert len(split) == 10
    for row_id in (9, 0, 4, np.int64(5)):
        _same(split[row_id], rows[row_id])
    for row, row_id in zip(split.__getitems__([7, 2, 7]), [7, 2, 7], strict=True):
        _same(row, rows[row_id])
    _same(pickle.loads(pickle.dumps(split))[3], rows[3])


def test_it_is_a_source_for_grain(tmp_path):
    rows = _rows(10)
    _write(tmp_path, rows, shards=2)
    split = PackedCache.open(tmp_path).split("train")
    shuffled = grain.MapDataset.source(split).shuffle(seed=1)
    assert sorted(int(row["row_id"]) for row in shuffled) == list(range(10))


def test_the_manifest_counts(tmp_path):
    rows = _rows(10)
    manifest = _write(tmp_path, rows, shards=3, packing="whole_documents", seed=5)
    train = manifest["splits"]["train"]
    assert (train["rows"], train["documents"], train["bytes"]) == (10, 7, 70)
    assert train["tokens"] == sum(int(row["loss_weights"].sum()) for row in rows)
    for index, name in enumerate(("code", "prose")):
        own = [row for row in rows if row["subset"] == index]
        tokens = sum(int(row["loss_weights"].sum()) for row in own)
        assert train["by_subset"][name].items() >= {"rows": len(own), "tokens": tokens}.items()
    assert (train["shared_documents"], train["duplicate_documents"]) == (1, 2)
    assert train["by_subset"]["prose"]["documents"] == 3
    assert sum(shard["rows"] for shard in train["shards"]) == 10
    assert (manifest["packing"], manifest["seed"]) == ("whole_documents", 5)
    cache = PackedCache.open(tmp_path)
    vocabulary = ByteVocabulary()
    assert cache.vocabulary == vocabulary
    assert cache.vocabulary_fingerprint == vocabulary.fingerprint
    assert (cache.vocabulary_size, cache.start_id) == (vocabulary.size, vocabulary.start_id)
    assert (cache.subsets, cache.split_names) == (("code", "prose"), ("train", "validation"))
    cache.verify()


def test_verify_reads_the_vocabulary_too(tmp_path):
    _write(tmp_path, _rows(10))
    PackedCache.open(tmp_path).verify()
    settings = tmp_path / "vocabulary" / "vocabulary.json"
    whole = settings.read_text()
    settings.write_text(whole[:-9])
    with pytest.raises(InputError, match="is not readable JSON"):
        PackedCache.open(tmp_path).verify()
    ByteVocabulary(reserved=3).save(settings.parent)
    with pytest.raises(InputError, match=r"has the fingerprint .* its manifest says"):
        PackedCache.open(tmp_path).verify()


def test_same_rows_same_bytes_and_digest(tmp_path):
    for name in ("a", "b"):
        _write(tmp_path / name, _rows(10), shards=2)
    _write(tmp_path / "c", _rows(10, seed=1), shards=2)
    digests = {n: PackedCache.open(tmp_path / n).digest for n in "abc"}
    assert digests["a"] == digests["b"] != digests["c"]
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    for file in files:
        assert _digest(tmp_path / "a" / file) == _digest(tmp_path / "b" / file), file


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def test_a_cache_that_was_never_finished_is_refused(tmp_path):
    _write(tmp_path, _rows(4))
    begin_cache(tmp_path)
    with pytest.raises(InputError, match="half-written"):
        PackedCache.open(tmp_path)
    fields = {"vocabulary": ByteVocabulary(), "sequence_length": LENGTH}
    write_rows(tmp_path, {"train": _rows(2)}, subsets=("code", "prose"), **fields)
    assert PackedCache.open(tmp_path).split_names == ("train",)
    assert not (tmp_path / "validation").exists()


def test_files_that_are_not_the_writers_are_left_alone(tmp_path):
    _write(tmp_path, _rows(4), shards=2)
    strangers = [
        *(tmp_path / split / "00.jsonl.zst" for split in ("train", "validation", "test")),
        tmp_path / "train" / "rows-of-mine.array_record",
        tmp_path / "train" / "folder" / "rows-00000-of-00001.array_record",
        tmp_path / "vocabulary" / "words.txt",
    ]
    for file in strangers:
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.name)
    (tmp_path / "train" / "rows-00000-of-00002.array_record.tmp").write_text("cut short")
    begin_cache(tmp_path)
    left = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {*strangers, tmp_path / "manifest.json"}
    assert [file.read_text() for file in strangers] == [file.name for file in strangers]


def test_a_failed_shard_leaves_no_file(tmp_path):
    def failing():
        yield from _rows(2)
        raise OSError("no space left")

    form = RecordFormat(LENGTH, ByteVocabulary().size)
    with pytest.raises(OSError, match="no space"):
        write_shard(tmp_path / "shard", failing(), form, ("code", "prose"), tmp_path / "temporary")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_damaged_shards_are_named(tmp_path, damage):
    _write(tmp_path, _rows(10), shards=2)
    shard = tmp_path / "train" / "rows-00001-of-00002.array_record"
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(data[:-10])
    else:
        shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(InputError, match="rows-00001-of-00002"):
        PackedCache.open(tmp_path).verify()
    if damage != "changed":
        with pytest.raises(InputError, match="expected"):
            PackedCache.open(tmp_path)


def test_no_such_split_and_no_such_row(tmp_path):
    _write(tmp_path, _rows(4))
    cache = PackedCache.open(tmp_path)
    with pytest.raises(InputError, match="no split 'test', it has train, validation"):
        cache.split("test")
    for row_id in (-1, 4):
        with pytest.raises(IndexError, match="of 4 rows"):
            cache.split("train")[row_id]


@settings(deadline=None)
@given(
    st.integers(2, 40),
    st.sampled_from([300, 2**16, 2**16 + 1, 300_000]),
    st.integers(0, 2**32),
)
def test_records_come_back(length, vocabulary_size, seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, length + 1, rng.integers(0, 4)))
    lengths = [size for size in np.diff([0, *cuts]) if size]
    segment_ids_L = np.zeros(length, np.int32)
    segment_ids_L[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    row = make_row(
        rng.integers(0, vocabulary_size, length), rng.integers(0, 2, length), segment_ids_L, 21, 5
    )
    record_format = RecordFormat(length, vocabulary_size)
    record = record_format.encode(row)
    bytes_per_token = 2 if vocabulary_size <= 2**16 else 4
    assert len(record) == 4 + 4 * len(lengths) + -(-length // 8) + bytes_per_token * length
    _same(record_format.decode(record, row_id=5), row)


def test_segments_out_of_order_are_our_own_mistake():
    row = make_row(np.ones(4), np.ones(4), np.array([0, 1, 1, 2]))
    with pytest.raises(AssertionError, match="segments"):
        RecordFormat(4, 300).encode(row)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecordFormat(4, 300).sequence_length = 5
