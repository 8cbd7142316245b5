"""Writes one shard of a packed cache, an ArrayRecord file of rows, atomically.

Shards of one cache may be written by different processes; `split_info` adds up their counts for the
manifest.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from salt_jax.data.features import Row
from salt_jax.data.row_records import RecordFormat
from salt_jax.storage.manifests import file_digest

# The names that `cache_shard` gives, and those of shards being written.
SHARD_FILE = re.compile(r"rows-\d{5,}-of-\d{5,}\.array_record(\.tmp)?")

# One record per group makes random reads cheap. Without compression, bytes don't depend on a
# compressor's version, and 16-bit tokens are read about twice as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """Counts of a written shard, and its SHA-256 digest (hex)."""

    rows: int
    bytes: int
    digest: str
    rows_by_subset: Mapping[str, int]
    tokens_by_subset: Mapping[str, int]  # with loss weight


@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """Document counts of one subset of one split."""

    documents: int = 0  # packed into rows
    bytes: int = 0  # of their text in UTF-8, for bits per byte
    shared_documents: int = 0  # left out because another split has their text
    # Left out, if deduplication was on: an earlier document of the split has the same text.
    duplicate_documents: int = 0

    def __add__(self, other: "DocumentCounts") -> "DocumentCounts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return DocumentCounts(*(own + others for own, others in pairs))


def cache_shard(folder: pathlib.Path, split: str, index: int, shards: int) -> pathlib.Path:
    """Where a cache keeps a shard: FOLDER/train/rows-00000-of-00004.array_record."""
    return folder / split / f"rows-{index:05d}-of-{shards:05d}.array_record"


def write_shard(
    file: pathlib.Path,
    rows: Iterable[Row],
    record_format: RecordFormat,
    subsets: Sequence[str],
    temporary: pathlib.Path,
) -> ShardCounts:
    """Writes rows (at least one, whose subsets are indices into `subsets`) in the order given; the
    file appears under its name only when complete, and is `temporary`, on the same disk, until
    then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    row_count: Counter[str] = Counter()
    token_count: Counter[str] = Counter()
    with _array_record(temporary) as writer:
        for row in rows:
            writer.write(record_format.encode(row))
            subset = subsets[int(row["subset"])]
            row_count[subset] += 1
            token_count[subset] += int(np.count_nonzero(row["loss_weights"]))
    assert row_count, f"no rows for {file}"
    size, digest = temporary.stat().st_size, file_digest(temporary)
    counts = ShardCounts(row_count.total(), size, digest, dict(row_count), dict(token_count))
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)
    return counts


def split_info(
    shards: Mapping[str, ShardCounts], documents: Mapping[str, DocumentCounts]
) -> dict[str, Any]:
    """A split's entry in the manifest, from its shards (by their path in the cache, in row order)
    and its document counts by subset."""
    rows: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for shard in shards.values():
        rows.update(shard.rows_by_subset)
        tokens.update(shard.tokens_by_subset)
    none = DocumentCounts()
    by_subset = {
        name: {
            **{"rows": rows[name], "tokens": tokens[name]},
            **dataclasses.asdict(documents.get(name, none)),
        }
        for name in sorted({*documents, *rows})
    }
    counted = ("rows", "tokens", *dataclasses.asdict(none))
    return {
        **{key: sum(of[key] for of in by_subset.values()) for key in counted},
        "by_subset": by_subset,
        "shards": [
            {"file": file, "rows": shard.rows, "bytes": shard.bytes, "digest": shard.digest}
            for file, shard in shards.items()
        ],
    }


@contextlib.contextmanager
def _array_record(file: pathlib.Path) -> Iterator[Any]:
    """An ArrayRecord file, removed if writing it fails."""
    writer = array_record_module.ArrayRecordWriter(str(file), _WRITER_OPTIONS)
    try:
        try:
            yield writer
        finally:
            writer.close()
    except BaseException as error:
        file.unlink(missing_ok=True)
        # The library reports a full disk as a RuntimeError.
        for number in (errno.ENOSPC, errno.EDQUOT):
            if isinstance(error, RuntimeError) and os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(file)) from error
        raise
