"""The merge round of a preparation: packs a bucket's documents of all units into a shard of rows.

Texts that another split keeps are left out, and optionally exact duplicates: equal texts of a split
are always in one bucket. The remaining documents are in the corpus's order until `packing.pack`
shuffles them. Jobs are independent; each holds one bucket in memory.
"""

import dataclasses
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from salt_jax.data.cache_shards import DocumentCounts, ShardCounts, cache_shard, write_shard
from salt_jax.data.packed_cache import SPLITS
from salt_jax.data.row_records import RecordFormat
from salt_jax.preparation.corpora import Unit
from salt_jax.preparation.local_runner import Progress
from salt_jax.preparation.mapping import first_buckets, part_file
from salt_jax.preparation.packing import Packing, cut_document, pack
from salt_jax.preparation.part_files import RECORD, read_bucket, token_dtype
from salt_jax.storage.durable_files import whole_file
from salt_jax.storage.job_journal import JobJournal


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """The settings of all merge jobs: `units` are each unit's subset names, by the unit's name, in
    the corpus's order; `buckets` counts by split; `plan` is a digest of all inputs of buckets, see
    MapJob."""

    folder: pathlib.Path
    work: JobJournal
    units: Mapping[str, Sequence[str]]
    subsets: tuple[str, ...]
    buckets: Mapping[str, int]
    packing: Packing
    vocabulary_size: int
    pad_id: int
    plan: str


@dataclasses.dataclass(frozen=True)
class MergeJob:
    """A bucket to merge: the common settings, its split, and its index in the split."""

    settings: MergeSettings
    split: str
    index: int

    @property
    def file(self) -> pathlib.Path:
        """The shard."""
        settings = self.settings
        return cache_shard(settings.folder, self.split, self.index, settings.buckets[self.split])

    @property
    def record(self) -> str:
        """The record's name."""
        return f"rows-{self.split}-{self.index}"


class MergedBucket(NamedTuple):
    """The record of a merged bucket: its shard (None without documents), document counts by subset,
    and how many documents were dropped or cut because they are longer than a row."""

    shard: ShardCounts | None
    documents: Mapping[str, DocumentCounts]
    long_documents: int


class _Documents(NamedTuple):
    """A bucket's documents: RECORD[D], int64[D] of the cache's subsets, and their tokens."""

    records: np.ndarray
    subsets: np.ndarray
    tokens: list[np.ndarray]


def merge_bucket(job: MergeJob) -> Progress:
    """Packs and shuffles a bucket's documents into its shard, then writes its record."""
    settings, packing = job.settings, job.settings.packing
    documents = _read(job)
    digest_D, text_bytes_D = documents.records["digest"], documents.records["text_bytes"]
    shared_T = np.load(_shared_texts(settings.work, job.split), mmap_mode="r")  # sorted
    shared_D = np.searchsorted(shared_T, digest_D, "right") > np.searchsorted(shared_T, digest_D)
    repeated_D = ~shared_D
    repeated_D[np.unique(digest_D, return_index=True)[1]] = False  # the first with each text
    kept_D = ~shared_D & ~repeated_D if packing.drop_duplicates else ~shared_D
    long_documents = 0
    if packing.long_documents != "split":
        long_D = kept_D & (documents.records["tokens"] > packing.sequence_length)
        long_documents = int(long_D.sum())
        if packing.long_documents == "drop":
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
    """The record of a bucket, None if it is not finished for this plan."""
    record = job.settings.work.finished(job.record, job.settings.plan, job.file)
    if record is None:
        return None
    shard = ShardCounts(**record["shard"]) if record["shard"] else None
    documents = {name: DocumentCounts(**count) for name, count in record["documents"].items()}
    return MergedBucket(shard, documents, record["long_documents"])


def write_shared_texts(settings: MergeSettings, units: Sequence[Unit]) -> None:
    """Writes for each split the sorted digests of the texts that later splits keep. A held-out
    fraction is chosen by text, so it shares none with the split that it is held out of."""
    first, total = first_buckets(settings.buckets), sum(settings.buckets.values())
    dtype = token_dtype(settings.vocabulary_size)
    for split in settings.buckets:
        digests = [
            np.unique(records_D["digest"])
            for unit in units
            for keeper in SPLITS[SPLITS.index(split) + 1 :]
            if keeper in unit.splits and split not in unit.splits
            for bucket in range(first[keeper], first[keeper] + settings.buckets[keeper])
            for records_D, _ in read_bucket(
                part_file(settings.work, unit.name), bucket, total, dtype, tokens=False
            )
        ]
        with whole_file(_shared_texts(settings.work, split)) as file:
            np.save(file, np.unique(np.concatenate([np.array([], "S16"), *digests])))


def _shared_texts(work: JobJournal, split: str) -> pathlib.Path:
    return work.path / f"shared-{split}.npy"


def _read(job: MergeJob) -> _Documents:
    settings = job.settings
    bucket = first_buckets(settings.buckets)[job.split] + job.index
    total, dtype = sum(settings.buckets.values()), token_dtype(settings.vocabulary_size)
    number = {name: index for index, name in enumerate(settings.subsets)}
    records = [np.array([], RECORD)]
    subsets = [np.array([], np.int64)]
    tokens: list[np.ndarray] = []
    for unit, names in settings.units.items():
        subset_of_unit = np.array([number[name] for name in names], np.int64)
        for records_D, tokens_T in read_bucket(
            part_file(settings.work, unit), bucket, total, dtype
        ):
            records.append(records_D)
            subsets.append(subset_of_unit[records_D["subset"]])
            tokens += np.split(tokens_T, np.cumsum(records_D["tokens"])[:-1])
    return _Documents(np.concatenate(records), np.concatenate(subsets), tokens)


def _write(job: MergeJob, documents: _Documents, kept_K: np.ndarray) -> ShardCounts:
    settings, length = job.settings, job.settings.packing.sequence_length
    tokens = [documents.tokens[index] for index in kept_K]
    prompt_tokens_K = documents.records["prompt_tokens"][kept_K].astype(np.int64)
    if settings.packing.long_documents == "cut":
        for at, own in enumerate(tokens):
            tokens[at], prompt_tokens_K[at] = cut_document(own, int(prompt_tokens_K[at]), length)
    rows = pack(
        tokens,
        documents.subsets[kept_K],
        prompt_tokens_K,
        settings.packing,
        pad_id=settings.pad_id,
        # The first bucket has the random key of a split in one shard.
        split=f"{job.split} {job.index}" if job.index else job.split,
    )
    record_format = RecordFormat(length, settings.vocabulary_size)
    temporary = settings.work.path / f"{job.file.name}.{secrets.token_hex(6)}.tmp"
    return write_shard(job.file, rows, record_format, settings.subsets, temporary)
