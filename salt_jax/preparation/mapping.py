"""The map round of a preparation: tokenizes a unit's documents into its part file.

Jobs are independent and idempotent, and run anywhere that sees the input files and the work folder;
each holds a block of a file and a block of tokens in memory.
"""

import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Mapping

from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary, load_vocabulary
from salt_jax.errors import needed_libraries
from salt_jax.preparation.corpora import TextUnit, Unit
from salt_jax.preparation.local_runner import Progress
from salt_jax.preparation.part_files import PartWriter, token_dtype
from salt_jax.preparation.reading_log import ReadingLog, SourceFile
from salt_jax.storage.durable_files import whole_file
from salt_jax.storage.job_journal import JobJournal


@dataclasses.dataclass(frozen=True)
class MapJob:
    """A unit to map.

    `work` has the vocabulary, of this fingerprint; `buckets` are counts by split. `plan` is a
    digest of all inputs of units: Beam may still run a job of an abandoned plan, whose record must
    not count for this one.
    """

    unit: Unit
    work: JobJournal
    buckets: Mapping[str, int]
    fingerprint: str
    plan: str
    drop_unknown: bool = False


@dataclasses.dataclass(frozen=True)
class MappedUnit:
    """The record of a finished unit; `bytes` is the size of its part file, and `subsets` are in
    order of appearance."""

    plan: str
    bytes: int
    subsets: tuple[str, ...]
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    sources: tuple[SourceFile, ...]
    lost_characters: int = 0


def map_unit(job: MapJob) -> Progress:
    """Tokenizes a unit's documents into its part file, then writes its record; InputError as
    `Unit.documents` and `Unit.sources`.

    A document's bucket is a hash of its text, so equal texts of a split share one.
    """
    vocabulary = _vocabulary(job.work.path / VOCABULARY_FOLDER, job.fingerprint)
    vocabulary.drop_unknown = job.drop_unknown
    first = first_buckets(job.buckets)
    log = ReadingLog()
    subsets: dict[str, int] = {}
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    with (
        whole_file(part_file(job.work, job.unit.name)) as file,
        needed_libraries("This text", "prepare"),
    ):
        part = PartWriter(file, sum(job.buckets.values()), token_dtype(vocabulary.size))
        for document in job.unit.documents(vocabulary, log):
            split = document.split
            bucket = int.from_bytes(document.digest[:8]) % job.buckets[split]
            subset = subsets.setdefault(document.subset, len(subsets))
            part.add(first[split] + bucket, document, subset)
            documents[split] += 1
            tokens[split] += len(document.tokens)
        part.finish()
        part_bytes = file.tell()
    record = MappedUnit(
        plan=job.plan,
        bytes=part_bytes,
        subsets=tuple(subsets),
        documents=dict(documents),
        tokens=dict(tokens),
        sources=tuple(job.unit.sources(log)),
        lost_characters=log.lost_characters,
    )
    job.work.finish(job.unit.name, job.plan, dataclasses.asdict(record))
    return Progress(documents.total(), tokens.total())


def part_file(work: JobJournal, unit: str) -> pathlib.Path:
    """A unit's part file."""
    return work.path / f"{unit}.part"


def mapped_unit(work: JobJournal, unit: Unit, plan: str) -> MappedUnit | None:
    """The record of a unit, None if it is not finished for this plan."""
    record = work.finished(unit.name, plan, part_file(work, unit.name))
    if record is None:
        return None
    sources = tuple(SourceFile(**source) for source in record.pop("sources"))
    refuses_broken = isinstance(unit, TextUnit) and not unit.text.skip_broken_lines
    if refuses_broken and any(source.broken_lines for source in sources):
        return None
    return MappedUnit(sources=sources, **record)


def first_buckets(buckets: Mapping[str, int]) -> dict[str, int]:
    """The index of each split's first bucket among the buckets of all splits."""
    names = list(buckets)
    return {name: sum(buckets[other] for other in names[:at]) for at, name in enumerate(names)}


@functools.lru_cache(maxsize=1)
def _vocabulary(folder: pathlib.Path, fingerprint: str) -> Vocabulary:
    """The vocabulary, cached between the jobs of a process."""
    vocabulary = load_vocabulary(folder)
    assert vocabulary.fingerprint == fingerprint, f"{folder} holds another vocabulary"
    return vocabulary
