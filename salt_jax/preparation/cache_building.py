"""Builds a packed cache from a corpus, in two rounds of jobs that any runner can execute.

Map: each unit's documents are tokenized and grouped by bucket (mapping.py). Merge: each bucket
becomes one shard of rows (merging.py). A document's bucket is a hash of its text and the order
inside a bucket depends on the seed, so the same text, settings and seed give the same bytes with
any runner. Finished parts stay in FOLDER/work until the cache is complete, and a preparation that
was stopped resumes from them.

Splits are disjoint: a text in several splits is kept in test, else in validation, only.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from salt_jax import __version__
from salt_jax.data.cache_shards import DocumentCounts, ShardCounts
from salt_jax.data.packed_cache import begin_cache, finish_cache
from salt_jax.data.row_records import LARGEST_SUBSET
from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.corpora import Corpus, TextUnit, Unit
from salt_jax.preparation.mapping import MapJob, MappedUnit, map_unit, mapped_unit
from salt_jax.preparation.merging import (
    MergeJob,
    MergeSettings,
    merge_bucket,
    merged_bucket,
    write_shared_texts,
)
from salt_jax.preparation.packing import Packing
from salt_jax.preparation.part_files import RECORD, token_dtype
from salt_jax.preparation.runners import JobRunner
from salt_jax.storage.job_journal import JobJournal
from salt_jax.storage.json_files import no_link_out, require_shape
from salt_jax.storage.manifests import json_digest
from salt_jax.terminal import say

# Overhead of an ArrayRecord file, and of a row in it, in bytes.
_SHARD_BYTES = 128 * 1024
_ROW_BYTES = 64
# How much text to estimate the number of tokens from.
_SAMPLE_BYTES = 64 * 1024

_PLAN_FILE = "plan.json"
_RECORDS = 2  # format version of the records of units and buckets; others are discarded


class WorkPlan(NamedTuple):
    """Digests of the inputs of intermediate files: those of units, the further ones of buckets, and
    those of the vocabulary's training, if it was trained."""

    units: str
    buckets: str
    trained: str | None = None

    @classmethod
    def of(cls, work: JobJournal) -> "WorkPlan | None":
        """The plan of a folder's intermediate files, or None."""
        plan = work.read(_PLAN_FILE)
        if plan is None:
            return None
        shape = {"units": str, "buckets": str, "trained": (None, str)}
        require_shape(work.path / _PLAN_FILE, plan, shape, work.remedy)
        return cls(*(plan[name] for name in shape))


def work_of(folder: pathlib.Path) -> JobJournal:
    """The folder of a cache's intermediate files:

    plan.json           a WorkPlan
    vocabulary/         the vocabulary that tokenizes the units
    train-00000.part    a unit's documents by bucket (part_files.py), with a record
    shared-train.npy    digests of texts that other splits keep
    rows-train-0.json   the record of a merged bucket, whose file is a shard of the cache
    failure-*.json      an error of a Beam job
    """
    work = folder / "work"
    return JobJournal(work, f"delete {work}, which is made again")


def discard_work(folder: pathlib.Path) -> None:
    """Removes a cache's intermediate files."""
    work_of(folder).discard(_PLAN_FILE)


class EmptySplit(InputError):  # noqa: N818 (says what was found)
    """A split has no documents, so finished parts are of no use: the text must change."""


@dataclasses.dataclass(frozen=True)
class Building:
    """A cache that is being built in `folder`; `trained` is the digest of the vocabulary's training
    inputs, if it was trained."""

    folder: pathlib.Path
    corpus: Corpus
    vocabulary: Vocabulary
    packing: Packing
    trained: str | None = None

    @property
    def work(self) -> JobJournal:
        """The folder of intermediate files."""
        return work_of(self.folder)

    @property
    def buckets(self) -> dict[str, int]:
        """The number of buckets of each split."""
        return self.corpus.buckets(self.packing.shards)

    @functools.cached_property
    def work_plan(self) -> WorkPlan:
        """The digests of the intermediate files' inputs."""
        units = json_digest(
            {
                "version": __version__,
                "units": [unit.identity() for unit in self.corpus.units],
                "subsets": self.corpus.subsets,
                "buckets": self.buckets,
                "vocabulary": self.vocabulary.fingerprint,
                "records": [RECORD.descr, _RECORDS],
            }
        )
        return WorkPlan(units, json_digest(dataclasses.asdict(self.packing)), self.trained)

    def finished_units(self) -> dict[str, MappedUnit]:
        """The finished units whose files are unchanged, by name."""
        found = {unit.name: self._mapped(unit) for unit in self.corpus.units}
        return {
            name: unit
            for name, unit in found.items()
            if unit and all(source.unchanged for source in unit.sources)
        }

    def estimated_bytes(self) -> int:
        """Rough size of the remaining part files and of the rows, extrapolated from the first
        unit's first documents; 0 if the corpus's size is unknown or nothing is left to map."""
        unit, units = self.corpus.units[0], len(self.corpus.units)
        resumes = WorkPlan.of(self.work) == self.work_plan
        left = units - len(self.finished_units()) if resumes else units
        if not self.corpus.text_bytes or not left or not isinstance(unit, TextUnit):
            return 0
        text_bytes, tokens = 0, 0
        for document in unit.text.read(unit.files):
            text = document.text[: _SAMPLE_BYTES // 4]
            text_bytes += len(text.encode())
            tokens += len(self.vocabulary.encode(text)) + 1
            if text_bytes >= _SAMPLE_BYTES:
                break
        expected = int(self.corpus.text_bytes * tokens / max(text_bytes, 1))
        part_bytes = expected * token_dtype(self.vocabulary.size).itemsize
        return part_bytes * left // units + self._rows_bytes(expected, sum(self.buckets.values()))

    def begin(self) -> None:
        """Prepares the work folder: removes the results of other settings, and those of files that
        have changed, which it names. InputError if the folder is a link that leads elsewhere."""
        work, plan = self.work, self.work_plan
        no_link_out(self.folder, work.path, "choose another --output_dir")
        before = WorkPlan.of(work)
        if before is None or before.units != plan.units:
            if before:
                say(f"{work.path} is from other settings or another version: it is made again.")
            work.discard(_PLAN_FILE)
        elif before.buckets != plan.buckets:
            self._discard_buckets()
        work.path.mkdir(exist_ok=True)
        work.remove_leftovers()
        if before != plan:
            self.vocabulary.save(work.path / VOCABULARY_FOLDER)
            work.write(_PLAN_FILE, plan._asdict())
        finished = self.finished_units()
        if len(finished) < len(self.corpus.units):
            self._discard_buckets()
        for unit in self.corpus.units:
            mapped = self._mapped(unit)
            if mapped and unit.name not in finished:
                changed = [source.path for source in mapped.sources if not source.unchanged]
                say(f"{', '.join(changed)} changed since it was read: it is read again.")
                (work.path / f"{unit.name}.json").unlink()

    def _discard_buckets(self) -> None:
        for record in self.work.path.glob("rows-*.json"):
            record.unlink()

    def build(self, runner: JobRunner, require_space: Callable[[int, str], None]) -> None:
        """Does the remaining work; call `begin` first. `require_space` is called with the bytes
        about to be written and their purpose.

        Raises:
          InputError: Malformed text; an empty split; too many subsets; a file that changed.
        """
        units = self._map(runner)
        settings = self._merge_settings(units)
        for split in self.buckets:
            if not any(unit.documents.get(split) for unit in units.values()):
                raise EmptySplit(_empty(split))
        jobs = [
            MergeJob(settings, split, index)
            for split, count in self.buckets.items()
            for index in range(count)
        ]
        left = [job for job in jobs if not merged_bucket(job)]
        if len(left) == len(jobs):
            tokens = sum(sum(unit.tokens.values()) for unit in units.values())
            require_space(self._rows_bytes(tokens, len(jobs)), "the rows of the packed cache")
            begin_cache(self.folder)
            write_shared_texts(settings, self.corpus.units)
        runner.run(merge_bucket, left, "shards", len(jobs) - len(left), self.work)
        self._finish(units, settings, jobs)

    def _map(self, runner: JobRunner) -> dict[str, MappedUnit]:
        finished = self.finished_units()
        jobs = [
            MapJob(
                unit,
                self.work,
                self.buckets,
                self.vocabulary.fingerprint,
                self.work_plan.units,
                self.vocabulary.drop_unknown,
            )
            for unit in self.corpus.units
            if unit.name not in finished
        ]
        runner.run(map_unit, jobs, "parts of the text", len(finished), self.work)
        finished = self.finished_units()
        for unit in self.corpus.units:
            if unit.name not in finished:
                named = ", ".join(map(str, getattr(unit, "paths", ())[:3]))
                raise InputError(
                    f"The files of {unit.name} ({named}) changed while others were read: run the "
                    "same command again."
                )
        return finished

    def _mapped(self, unit: Unit) -> MappedUnit | None:
        return mapped_unit(self.work, unit, self.work_plan.units)

    def _merge_settings(self, units: Mapping[str, MappedUnit]) -> MergeSettings:
        found = {name for unit in units.values() for name in unit.subsets}
        subsets = self.corpus.subsets or tuple(sorted(found))
        if len(subsets) > LARGEST_SUBSET + 1:
            raise InputError(
                f"The text has {len(subsets):,} subset names, a cache holds at most "
                f"{LARGEST_SUBSET + 1:,}: leave `subset` out of the rows, or give fewer names."
            )
        digests = [[source.digest for source in units[u.name].sources] for u in self.corpus.units]
        return MergeSettings(
            folder=self.folder,
            work=self.work,
            units={name: unit.subsets for name, unit in units.items()},
            subsets=subsets,
            buckets=self.buckets,
            packing=self.packing,
            vocabulary_size=self.vocabulary.size,
            pad_id=self.vocabulary.pad_id,
            plan=json_digest([self.work_plan, *digests]),
        )

    def _rows_bytes(self, tokens: int, shards: int) -> int:
        length = self.packing.sequence_length
        row = length * token_dtype(self.vocabulary.size).itemsize + length // 8 + _ROW_BYTES
        return tokens // length * row + shards * _SHARD_BYTES

    def _finish(
        self,
        units: Mapping[str, MappedUnit],
        settings: MergeSettings,
        jobs: Sequence[MergeJob],
    ) -> None:
        sources = {source.path: source for unit in units.values() for source in unit.sources}
        shards: dict[str, dict[str, ShardCounts]] = {split: {} for split in self.buckets}
        documents: dict[str, dict[str, DocumentCounts]] = {split: {} for split in self.buckets}
        too_long = dict.fromkeys(self.buckets, 0)
        for job in jobs:
            bucket = merged_bucket(job)
            assert bucket is not None, f"{job.file} isn't merged"
            if bucket.shard:
                shards[job.split][str(job.file.relative_to(self.folder))] = bucket.shard
            too_long[job.split] += bucket.long_documents
            counts = documents[job.split]
            for name, count in bucket.documents.items():
                counts[name] = counts.get(name, DocumentCounts()) + count
        for split, written in shards.items():
            if not written:
                raise EmptySplit(self._nothing_left(split, too_long[split]))
        recorded: dict[str, Any] = {
            name: getattr(self.packing, name) for name in ("packing", "seed", "drop_duplicates")
        }
        if (handling := self.packing.long_documents) != "split":
            recorded["long_documents"] = {"handling": handling, "by_split": too_long}
        if lost := sum(unit.lost_characters for unit in units.values()):
            recorded["lost_characters"] = lost
        finish_cache(
            self.folder,
            {split: (written, documents[split]) for split, written in shards.items()},
            vocabulary=self.vocabulary,
            sequence_length=self.packing.sequence_length,
            subsets=settings.subsets,
            sources=[sources[path].as_source() for path in sorted(sources)],
            **recorded,
        )
        discard_work(self.folder)

    def _nothing_left(self, split: str, too_long: int) -> str:
        if too_long:
            return (
                f"All {too_long:,} documents of the {split} split that no other has are longer "
                f"than a row of {self.packing.sequence_length} tokens: raise --sequence_length, or "
                "set --long_documents to 'cut'."
            )
        return (
            f"Every text of the {split} split is in another split too, and splits are kept "
            "disjoint: correct the task's files."
        )


def _empty(split: str) -> str:
    if split == "train":
        return (
            "There is no text to train on: set TextFiles.train to files that hold text, or hold "
            "out a smaller fraction of it."
        )
    return (
        f"The {split} split of the text is empty: set TextFiles.{split}_fraction higher or "
        f"TextFiles.{split} to more text, or cut plain text into smaller pieces (piece_bytes)."
    )
