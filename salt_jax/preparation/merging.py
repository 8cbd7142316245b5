"""The second half of a preparation: a bucket's documents, out of all units, into one shard of rows.

In: a MergeJob. Out: the shard in the cache's folder and its record in the work folder. Jobs share
nothing, as in mapping.py; memory holds one bucket.

Texts that another split keeps are left out here, and so are exact duplicates where that is asked
for: equal texts of a split are always in one bucket. The documents that are left stand in the
corpus's order, which PackedSplit shuffles.
"""

import dataclasses
import pathlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from salt_jax.data.cache_shards import DocumentCounts, ShardCounts, shard_path, write_shard
from salt_jax.data.row_records import RecordFormat
from salt_jax.preparation.mapping import Progress, part_file
from salt_jax.preparation.packing import PackedSplit, PackingPlan, cut_document
from salt_jax.preparation.part_files import RECORD, read_bucket, token_dtype
from salt_jax.storage.durable_files import whole_file
from salt_jax.storage.job_journal import JobJournal


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """What all buckets share.

    Attributes:
      folder: The cache's.
      work: Where the part files are.
      units: Names of each unit's subsets, by the unit's name, in the corpus's order.
      subsets: The cache's subset names.
      buckets: How many there are, all splits together.
      packing: How to pack.
      drop_duplicates: Whether of equal texts of a split only the first is kept.
      vocabulary_size: All ids.
      pad_id: What fills rows up.
      plan: Digest of what the buckets depend on; see mapping.MapJob.
    """

    folder: pathlib.Path
    work: JobJournal
    units: Mapping[str, Sequence[str]]
    subsets: tuple[str, ...]
    buckets: int
    packing: PackingPlan
    drop_duplicates: bool
    vocabulary_size: int
    pad_id: int
    plan: str


@dataclasses.dataclass(frozen=True)
class MergeJob:
    """A bucket to merge.

    Attributes:
      settings: What all buckets share.
      split: The split it is of.
      index: Which of the split's buckets.
      shards: How many the split has.
      column: Its number among the buckets of all splits.
    """

    settings: MergeSettings
    split: str
    index: int
    shards: int
    column: int

    @property
    def file(self) -> pathlib.Path:
        """The shard."""
        return shard_path(self.settings.folder, self.split, self.index, self.shards)

    @property
    def record(self) -> str:
        """The name of its record."""
        return f"rows-{self.split}-{self.index}"


class MergedBucket(NamedTuple):
    """The record of a merged bucket.

    Attributes:
      shard: What was written; None where the bucket has no document.
      documents: By the subset's name.
      long_documents: Dropped or cut because they are longer than a row.
    """

    shard: ShardCounts | None
    documents: Mapping[str, DocumentCounts]
    long_documents: int


class _Documents(NamedTuple):
    """A bucket's documents: RECORD[D], int64[D] of the cache's subsets, and their tokens."""

    records: np.ndarray
    subsets: np.ndarray
    tokens: list[np.ndarray]


def merge_bucket(job: MergeJob) -> Progress:
    """Packs and shuffles a bucket's documents into its shard, then writes its record.

    Raises:
      OSError: The disk is full.
    """
    settings = job.settings
    documents = _read(job)
    digest_D, text_bytes_D = documents.records["digest"], documents.records["text_bytes"]
    shared_D = _shared(digest_D, _shared_texts(settings.work, job.split))
    repeated_D = ~shared_D & _repeated(digest_D)
    kept_D = ~shared_D & ~repeated_D if settings.drop_duplicates else ~shared_D
    long_documents = 0
    if settings.packing.long_documents != "split":
        long_D = kept_D & (documents.records["tokens"] > settings.packing.sequence_length)
        long_documents = int(long_D.sum())
        if settings.packing.long_documents == "drop":
            kept_D &= ~long_D
    counts = {}
    for index in np.unique(documents.subsets):
        own_D = documents.subsets == index
        counts[settings.subsets[index]] = DocumentCounts(
            documents=int((own_D & kept_D).sum()),
            bytes=int(text_bytes_D[own_D & kept_D].sum()),
            shared_documents=int((own_D & shared_D).sum()),
            duplicate_documents=int((own_D & repeated_D).sum()),
        )
    shard = _write(job, documents, np.flatnonzero(kept_D)) if kept_D.any() else None
    record = {
        "bytes": shard.bytes if shard else 0,
        "shard": dataclasses.asdict(shard) if shard else None,
        "documents": {name: dataclasses.asdict(count) for name, count in counts.items()},
        "long_documents": long_documents,
    }
    settings.work.finish(job.record, settings.plan, record)
    return Progress(len(kept_D), sum(map(len, documents.tokens)))


def merged_bucket(job: MergeJob) -> MergedBucket | None:
    """The record of a bucket, None if it isn't finished for this plan."""
    record = job.settings.work.finished(job.record, job.settings.plan, job.file)
    if record is None:
        return None
    shard = ShardCounts(**record["shard"]) if record["shard"] else None
    documents = {name: DocumentCounts(**count) for name, count in record["documents"].items()}
    return MergedBucket(shard, documents, record["long_documents"])


def write_shared_texts(
    work: JobJournal,
    split: str,
    units: Iterable[str],
    columns: Iterable[int],
    buckets: int,
    dtype: np.dtype,
) -> None:
    """Writes the digests of texts that a split leaves to others, sorted.

    Args:
      work: Where the part files are.
      split: The split that leaves them.
      units: The units with the others' documents.
      columns: The others' buckets.
      buckets: How many there are, all splits together.
      dtype: Of a token.
    """
    columns = list(columns)
    digests = [
        np.unique(records_D["digest"])
        for unit in units
        for column in columns
        for records_D, _ in read_bucket(part_file(work, unit), column, buckets, dtype, tokens=False)
    ]
    with whole_file(_shared_texts(work, split)) as file:
        np.save(file, np.unique(np.concatenate([np.array([], "S16"), *digests])))


def _shared_texts(work: JobJournal, split: str) -> pathlib.Path:
    return work.path / f"shared-{split}.npy"


def _read(job: MergeJob) -> _Documents:
    settings = job.settings
    number = {name: index for index, name in enumerate(settings.subsets)}
    dtype = token_dtype(settings.vocabulary_size)
    records = [np.array([], RECORD)]
    subsets = [np.array([], np.int64)]
    tokens: list[np.ndarray] = []
    for unit, names in settings.units.items():
        subset_of_unit = np.array([number[name] for name in names], np.int64)
        part = part_file(settings.work, unit)
        for records_D, tokens_T in read_bucket(part, job.column, settings.buckets, dtype):
            records.append(records_D)
            subsets.append(subset_of_unit[records_D["subset"]])
            tokens += np.split(tokens_T, np.cumsum(records_D["tokens"])[:-1])
    return _Documents(np.concatenate(records), np.concatenate(subsets), tokens)


def _shared(digest_D: np.ndarray, file: pathlib.Path) -> np.ndarray:
    """bool[D]: whose text is among the sorted digests of a file; none where there is no file."""
    if not file.exists():
        return np.zeros(len(digest_D), bool)
    sorted_T = np.load(file, mmap_mode="r")
    if not len(sorted_T):
        return np.zeros(len(digest_D), bool)
    place_D = np.minimum(np.searchsorted(sorted_T, digest_D), len(sorted_T) - 1)
    return sorted_T[place_D] == digest_D


def _repeated(digest_D: np.ndarray) -> np.ndarray:
    """bool[D]: whose text an earlier document has."""
    repeated_D = np.ones(len(digest_D), bool)
    repeated_D[np.unique(digest_D, return_index=True)[1]] = False
    return repeated_D


def _write(job: MergeJob, documents: _Documents, kept_K: np.ndarray) -> ShardCounts:
    settings = job.settings
    tokens = [documents.tokens[index] for index in kept_K]
    prompt_tokens_K = documents.records["prompt_tokens"][kept_K].astype(np.int64)
    if settings.packing.long_documents == "cut":
        for at, own in enumerate(tokens):
            tokens[at], prompt_tokens_K[at] = cut_document(
                own, int(prompt_tokens_K[at]), settings.packing.sequence_length
            )
    rows = PackedSplit(
        tokens,
        documents.subsets[kept_K],
        packing=settings.packing.packing,
        sequence_length=settings.packing.sequence_length,
        pad_id=settings.pad_id,
        seed=settings.packing.seed,
        # The first bucket's order is the one that a split in one shard has.
        split=f"{job.split} {job.index}" if job.index else job.split,
        prompt_tokens_D=prompt_tokens_K,
    )
    record_format = RecordFormat(settings.packing.sequence_length, settings.vocabulary_size)
    temporary = settings.work.path / f"{job.file.name}.{secrets.token_hex(6)}.tmp"
    return write_shard(job.file, rows, record_format, settings.subsets, temporary)
