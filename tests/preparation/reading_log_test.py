"""The log of a reading: the digest comes on the way, and a change is noticed."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from salt_jax.errors import InputError
from salt_jax.preparation import reading_log
from salt_jax.preparation.readers import read_documents
from salt_jax.preparation.reading_log import ReadingLog, state_of
from salt_jax.storage.manifests import file_digest

LINES = "".join(json.dumps({"text": f"{n} " * 50}) + "\n" for n in range(4000)).encode()
PACKED = {
    "a.txt": LINES.replace(b"{", b"").replace(b"}", b""),
    "a.txt.xz": lzma.compress(LINES.replace(b"{", b"").replace(b"}", b"")),
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
}


@pytest.fixture
def path(tmp_path, request):
    (tmp_path / request.param).write_bytes(PACKED[request.param])
    return tmp_path / request.param


@pytest.mark.parametrize("path", PACKED, indirect=True)
@pytest.mark.parametrize("to_the_end", [True, False])
def test_a_file_is_digested_while_it_is_read(path, monkeypatch, to_the_end):
    log = ReadingLog()
    documents = read_documents(path, log=log, piece_bytes=1000)
    count = len(list(documents)) if to_the_end else len([next(documents)])
    documents.close()
    expected = file_digest(path)
    if to_the_end:
        monkeypatch.setattr(reading_log, "source_digest", None)  # not to be read a second time
        assert count > 100
    (source,) = log.sources([path])
    assert (source.path, source.digest) == (str(path), expected)
    assert (source.bytes, source.changed_ns) == state_of(path)
    assert source.as_source() == {"file": path.name, "bytes": source.bytes, "digest": expected}


@pytest.mark.parametrize("path", ["a.jsonl"], indirect=True)
def test_a_change_is_noticed(path):
    log = ReadingLog()
    list(read_documents(path, log=log))
    (source,) = log.sources([path])
    assert source.unchanged
    os.utime(path, ns=(0, source.changed_ns + 1))
    assert not source.unchanged
    with pytest.raises(InputError, match=r"a\.jsonl changed while it was read"):
        log.sources([path])
    path.unlink()
    assert not source.unchanged


def test_a_parquet_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path, log = tmp_path / "a.parquet", ReadingLog()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"] * 400}), path)
    documents = read_documents(path, log=log)
    next(documents)
    (before,) = log.sources([path])
    assert (before.digest, before.bytes) == (file_digest(path), path.stat().st_size)
    os.utime(path, ns=(0, before.changed_ns + 1))
    assert len(list(documents)) == 799
    with pytest.raises(InputError, match=r"a\.parquet changed while it was read"):
        log.sources([path])
