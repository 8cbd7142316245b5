"""Rows of a cache in a bucket: the same as on disk, by few requests, within a bound on disk."""

import os
import pathlib
import pickle
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from salt_jax.data import features
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from salt_jax.storage import block_copies, local_copies
from tests.bucket_emulator import BucketEmulator
from tests.written_cache import write_rows

LENGTH, ROWS = 512, 600
URLS = ["gs://bucket/caches/c4", "s3://bucket/caches/c4"]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A cache whose shards have rows of different lengths."""
    return write_cache(tmp_path / "c4", shards=3)


def write_cache(folder: pathlib.Path, shards: int) -> pathlib.Path:
    rng = np.random.default_rng(0)

    def row() -> features.Row:
        segments = np.sort(rng.integers(1, rng.integers(2, 9), size=LENGTH))
        segments = np.unique(segments, return_inverse=True)[1] + 1
        targets = rng.integers(3, 250, size=LENGTH).astype(np.int32)
        return features.make_row(targets, rng.random(LENGTH) < 0.9, segments, 0)

    rows = {"train": [row() for _ in range(ROWS)]}
    write_rows(folder, rows, vocabulary=ByteVocabulary(), sequence_length=LENGTH, shards=shards)
    return folder


def sent(folder: pathlib.Path, bucket: BucketEmulator) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"bucket/caches/c4/{path.relative_to(folder).as_posix()}"
            bucket.store(name, path.read_bytes())


def assert_equal_rows(one: list[features.Row], other: list[features.Row]) -> None:
    assert len(one) == len(other)
    for row, same in zip(one, other, strict=True):
        assert row.keys() == same.keys()
        assert all(np.array_equal(row[name], same[name]) for name in row)


def forget(split: object) -> object:
    """As another process has it."""
    return pickle.loads(pickle.dumps(split))


@pytest.mark.parametrize("url", URLS)
def test_rows_are_those_on_disk(url, folder, bucket):
    pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[url[:2]])
    sent(folder, bucket)
    ids = np.random.default_rng(1).permutation(ROWS).tolist()
    here, there = PackedCache.open(folder).split("train"), PackedCache.open(url).split("train")
    for first in range(0, ROWS, 50):
        own = ids[first : first + 50]
        assert_equal_rows(there.__getitems__(own), here.__getitems__(own))
    assert_equal_rows([there[ROWS - 1]], [here[ROWS - 1]])
    PackedCache.open(url).verify()


@pytest.mark.parametrize("url", URLS)
def test_opening_many_shards_takes_one_listing(url, tmp_path, bucket):
    pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[url[:2]])
    sent(write_cache(tmp_path / "c4", shards=ROWS), bucket)
    PackedCache.open(url)
    assert bucket.asked["list"] == 1
    assert bucket.asked["read"] == 3  # the manifest, COMPLETED and the vocabulary
    assert len(bucket.seen) <= 12
    before = bucket.asked.copy()
    cache = PackedCache.open(url)
    assert (bucket.asked - before) == {"list": 1}
    cache.split("train").__getitems__([5, 7])
    # Small shards are one block each, index included.
    assert (bucket.asked - before) == {"list": 1, "read": 2}


def test_a_row_takes_one_read_once_its_shard_is_open(folder, bucket, monkeypatch):
    pytest.importorskip("gcsfs")
    sent(folder, bucket)
    monkeypatch.setattr(block_copies, "BLOCK", 2**14)
    monkeypatch.setattr("salt_jax.data.remote_records.BLOCK", 2**14)
    monkeypatch.setattr("salt_jax.data.remote_records._READER_BUFFER", 2**13)
    split = PackedCache.open(URLS[0]).split("train")
    split.__getitems__([0, 200, 400])
    reads = bucket.asked["read"]
    split.__getitems__([40, 240, 440])
    assert bucket.asked["read"] == reads + 3
    split.__getitems__([440, 40])
    assert bucket.asked["read"] == reads + 3


def test_what_one_process_has_fetched_others_read(folder, bucket):
    pytest.importorskip("gcsfs")
    sent(folder, bucket)
    split = PackedCache.open(URLS[0]).split("train")
    rows, reads = split.__getitems__(range(ROWS)), bucket.asked["read"]
    assert_equal_rows(forget(split).__getitems__(range(ROWS)), rows)
    assert bucket.asked["read"] == reads


def test_the_bound_on_disk_is_kept(folder, bucket, monkeypatch):
    pytest.importorskip("gcsfs")
    sent(folder, bucket)
    monkeypatch.setattr(block_copies, "_LOOK_BYTES", 1)
    shard = (folder / "train/rows-00000-of-00003.array_record").stat().st_size
    monkeypatch.setenv("SALT_LOCAL_COPIES_GB", str(1.5 * shard / 1e9))
    here, there = PackedCache.open(folder).split("train"), PackedCache.open(URLS[0]).split("train")
    for row in [0, 250, 450, 10, 599, 260] * 2:
        assert_equal_rows([there[row]], [here[row]])
        kept = [p.stat().st_blocks * 512 for p in local_copies.copies_folder().rglob("*.blocks")]
        assert sum(kept) <= 1.5 * shard
        assert kept  # the one in use
    monkeypatch.setenv("SALT_LOCAL_COPIES_GB", "lots")
    with pytest.raises(InputError, match="SALT_LOCAL_COPIES_GB is 'lots'"):
        PackedCache.open(URLS[0]).split("train").__getitems__([0, 250, 599])


def test_a_copy_that_was_damaged_is_fetched_anew(folder, bucket):
    pytest.importorskip("gcsfs")
    sent(folder, bucket)
    split = PackedCache.open(URLS[0]).split("train")
    rows = split.__getitems__(range(ROWS))
    for path in local_copies.copies_folder().rglob("*.blocks"):
        size = path.stat().st_size
        os.truncate(path, 0)
        os.truncate(path, size)
    assert_equal_rows(forget(split).__getitems__(range(ROWS)), rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.objects.clear(), "cannot be read"),
        (lambda b: b.failing.add("read"), "cannot be read.*permissions"),
        (lambda b: shorten(b), "is shorter than it was"),
    ],
)
def test_a_bucket_that_is_lost_under_a_run(
    change: Callable[[BucketEmulator], None], said: str, folder, bucket
):
    pytest.importorskip("gcsfs")
    sent(folder, bucket)
    split = PackedCache.open(URLS[0]).split("train")
    change(bucket)
    with pytest.raises(InputError, match=said) as caught:
        split[0]
    assert "\n" not in str(caught.value)
    shutil.rmtree(local_copies.copies_folder())


def shorten(bucket: BucketEmulator) -> None:
    for name in bucket.names("bucket/caches/c4/train"):
        whole = f"bucket/caches/c4/train/{name}"
        bucket.store(whole, bucket.objects[whole][: 2**16])


def test_shards_that_are_missing_or_cut_are_named_when_opened(folder, bucket):
    pytest.importorskip("gcsfs")
    sent(folder, bucket)
    shorten(bucket)
    with pytest.raises(InputError, match=r"gs://.*rows-00000-of-00003.* has 65,536 bytes"):
        PackedCache.open(URLS[0])
    for name in bucket.names("bucket/caches/c4/train"):
        del bucket.objects[f"bucket/caches/c4/train/{name}"]
    with pytest.raises(InputError, match=r"rows-00000-of-00003.* does not exist"):
        PackedCache.open(URLS[0])
