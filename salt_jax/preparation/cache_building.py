"""A corpus into a packed cache, in two rounds of jobs that any runner can do.

In: a corpus, its vocabulary, how to pack, and something that runs jobs. Out: the cache in a
folder. Map: each unit's documents are tokenized and laid down by bucket (mapping.py). Merge: each
bucket becomes one shard of rows (merging.py). A document's bucket is a hash of its text, the order
inside a bucket one of the seed, so the same text, settings and seed give the same bytes whoever
does the jobs. What is finished lies in FOLDER/work until the cache is complete, and is not made
again.

Splits stay apart: a text that stands in several is kept in the test split, else in validation, and
left out of the others.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from salt_jax import __version__
from salt_jax.data.cache_shards import DocumentCounts, ShardCounts
from salt_jax.data.packed_cache import SPLITS, PackedCacheWriter, begin_cache
from salt_jax.data.row_records import LARGEST_SUBSET
from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.corpora import Corpus, TextUnit, Unit
from salt_jax.preparation.mapping import (
    MapJob,
    MappedUnit,
    RunJobs,
    first_buckets,
    map_unit,
    mapped_unit,
)
from salt_jax.preparation.merging import (
    MergeJob,
    MergeSettings,
    merge_bucket,
    merged_bucket,
    write_shared_texts,
)
from salt_jax.preparation.packing import PackingPlan
from salt_jax.preparation.part_files import RECORD, token_dtype
from salt_jax.storage.job_journal import JobJournal
from salt_jax.storage.json_files import no_link_out, require_shape
from salt_jax.storage.manifests import json_digest
from salt_jax.terminal import say

# Of an ArrayRecord file, and of a row in it beside its tokens.
_SHARD_BYTES = 128 * 1024
_ROW_BYTES = 64
# Text to estimate tokens from.
_SAMPLE_BYTES = 64 * 1024
_PLAN_FILE = "plan.json"
_RECORDS = 2  # what records of units and buckets hold; another number makes them again


class WorkPlan(NamedTuple):
    """Digests of what intermediate files depend on.

    Attributes:
      units: Of everything that units depend on.
      buckets: Of everything else that buckets depend on.
      trained: Of what the vocabulary was trained on, if it was.
    """

    units: str
    buckets: str
    trained: str | None = None

    @classmethod
    def of(cls, work: JobJournal) -> "WorkPlan | None":
        """The plan of a folder's intermediate files, None if there are none."""
        plan = work.read(_PLAN_FILE)
        if plan is None:
            return None
        shape = {"units": str, "buckets": str, "trained": (None, str)}
        require_shape(work.path / _PLAN_FILE, plan, shape, work.remedy)
        return cls(*(plan[name] for name in shape))


def work_of(folder: pathlib.Path) -> JobJournal:
    """The intermediate files of a cache in the making:

    plan.json           a WorkPlan
    vocabulary/         what the units are tokenized with
    train-00000.part    a unit's documents by bucket (part_files.py), with a record
    shared-train.npy    digests of texts that other splits keep
    rows-train-0.json   the record of a merged bucket, whose file is a shard of the cache
    failure-*.json      an error of a job that Beam ran
    """
    work = folder / "work"
    return JobJournal(work, f"delete {work}, which is made again")


def discard_work(folder: pathlib.Path) -> None:
    """Removes a cache's intermediate files."""
    work_of(folder).discard(_PLAN_FILE)


@dataclasses.dataclass(frozen=True)
class Building:
    """A cache in the making.

    Attributes:
      folder: Where the cache will lie.
      corpus: What is prepared.
      vocabulary: Its vocabulary.
      plan: How to pack.
      drop_duplicates: Whether of equal texts of a split only the first is kept.
      trained: Digest of what the vocabulary was trained on, if it was.
    """

    folder: pathlib.Path
    corpus: Corpus
    vocabulary: Vocabulary
    plan: PackingPlan
    drop_duplicates: bool = False
    trained: str | None = None

    @property
    def work(self) -> JobJournal:
        """Its intermediate files."""
        return work_of(self.folder)

    @property
    def buckets(self) -> dict[str, int]:
        """Buckets of each split."""
        return self.corpus.buckets(self.plan.shards)

    @functools.cached_property
    def work_plan(self) -> WorkPlan:
        """What the intermediate files depend on."""
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
        buckets = json_digest([dataclasses.asdict(self.plan), self.drop_duplicates])
        return WorkPlan(units, buckets, self.trained)

    def finished_units(self) -> dict[str, MappedUnit]:
        """The units that are done and whose files are still the same, by name."""
        found = {unit.name: self._mapped(unit) for unit in self.corpus.units}
        return {
            name: unit
            for name, unit in found.items()
            if unit and all(source.unchanged for source in unit.sources)
        }

    def estimated_bytes(self) -> int:
        """Roughly what the part files that are left and the rows will take, by the first unit's
        first documents; 0 where the corpus's size isn't known, or all of it is mapped."""
        unit, units = self.corpus.units[0], len(self.corpus.units)
        going_on = WorkPlan.of(self.work) == self.work_plan
        left = units - len(self.finished_units()) if going_on else units
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
        """Prepares the folder of intermediate files. Those of other settings or files are removed,
        and changed files are named.

        Raises:
          InputError: The folder is a link that leads elsewhere, where nothing is to be removed.
        """
        work, plan = self.work, self.work_plan
        no_link_out(self.folder, work.path, "choose another --output_dir")
        before = WorkPlan.of(work)
        if before is None or before.units != plan.units:
            if before:
                say(f"{work.path} is of other settings or another version: it is made again.")
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

    def build(self, run: RunJobs, require_space: Callable[[int], None]) -> None:
        """Does what is left to do; `begin` comes first.

        Args:
          run: Runs the jobs.
          require_space: Called with the bytes about to be written, once they are known.

        Raises:
          InputError: Bad text; a split without documents; too many subsets; a changed file.
        """
        units = self._map(run)
        settings = self._merge_settings(units)
        self._refuse_empty_splits(units)
        jobs = self._merge_jobs(settings)
        left = [job for job in jobs if not merged_bucket(job)]
        if len(left) == len(jobs):
            tokens = sum(sum(unit.tokens.values()) for unit in units.values())
            require_space(self._rows_bytes(tokens, len(jobs)))
            begin_cache(self.folder)
            self._write_shared_texts(units)
        run(merge_bucket, left, "shards", len(jobs) - len(left))
        self._finish(units, settings, jobs)

    def _map(self, run: RunJobs) -> dict[str, MappedUnit]:
        finished = self.finished_units()
        left = [unit for unit in self.corpus.units if unit.name not in finished]
        fingerprint = self.vocabulary.fingerprint
        plan = self.work_plan.units
        drop_unknown = self.vocabulary.drop_unknown
        jobs = [
            MapJob(unit, self.work, self.buckets, fingerprint, plan, drop_unknown) for unit in left
        ]
        run(map_unit, jobs, "parts of the text", len(finished))
        finished = self.finished_units()
        for unit in self.corpus.units:
            if unit.name not in finished:
                raise InputError(
                    f"The files of {_described(unit)} changed while others were read: run the same "
                    "command again."
                )
        return finished

    def _mapped(self, unit: Unit) -> MappedUnit | None:
        return mapped_unit(self.work, unit, self.work_plan.units)

    def _refuse_empty_splits(self, units: Mapping[str, MappedUnit]) -> None:
        for split in self.buckets:
            if not any(unit.documents.get(split) for unit in units.values()):
                raise EmptySplit(_empty(split))

    def _merge_settings(self, units: Mapping[str, MappedUnit]) -> MergeSettings:
        found = {name for unit in units.values() for name in unit.subsets}
        subsets = self.corpus.subsets or tuple(sorted(found))
        if len(subsets) > LARGEST_SUBSET + 1:
            raise InputError(
                f"The text has {len(subsets):,} subset names, a cache holds "
                f"{LARGEST_SUBSET + 1:,}: leave `subset` out of the rows, or give fewer names."
            )
        return MergeSettings(
            folder=self.folder,
            work=self.work,
            units={name: unit.subsets for name, unit in units.items()},
            subsets=subsets,
            buckets=sum(self.buckets.values()),
            packing=self.plan,
            drop_duplicates=self.drop_duplicates,
            vocabulary_size=self.vocabulary.size,
            pad_id=self.vocabulary.pad_id,
            plan=json_digest([self.work_plan, *self._read(units)]),
        )

    def _read(self, units: Mapping[str, MappedUnit]) -> list[list[str]]:
        """Digests of what each unit read."""
        return [[source.digest for source in units[u.name].sources] for u in self.corpus.units]

    def _merge_jobs(self, settings: MergeSettings) -> list[MergeJob]:
        first = first_buckets(self.buckets)
        return [
            MergeJob(settings, split, index, count, first[split] + index)
            for split, count in self.buckets.items()
            for index in range(count)
        ]

    def _rows_bytes(self, tokens: int, shards: int) -> int:
        length = self.plan.sequence_length
        row = length * token_dtype(self.vocabulary.size).itemsize + length // 8 + _ROW_BYTES
        return tokens // length * row + shards * _SHARD_BYTES

    def _write_shared_texts(self, units: Mapping[str, MappedUnit]) -> None:
        """For every split, the texts that later splits keep. A fraction is held out by text and
        shares none with what it is held out of."""
        first = first_buckets(self.buckets)
        for split in self.buckets:
            later = [name for name in self.buckets if SPLITS.index(name) > SPLITS.index(split)]
            others = [
                unit
                for unit in self.corpus.units
                if split not in unit.splits and not set(later).isdisjoint(unit.splits)
            ]
            columns = {first[name] + i for name in later for i in range(self.buckets[name])}
            names = [unit.name for unit in others]
            total = sum(self.buckets.values())
            dtype = token_dtype(self.vocabulary.size)
            write_shared_texts(self.work, split, names, sorted(columns), total, dtype)

    def _finish(
        self,
        units: Mapping[str, MappedUnit],
        settings: MergeSettings,
        jobs: Sequence[MergeJob],
    ) -> None:
        sources = {source.path: source for unit in units.values() for source in unit.sources}
        shards: dict[str, dict[str, ShardCounts]] = {split: {} for split in self.buckets}
        documents: dict[str, dict[str, DocumentCounts]] = {split: {} for split in self.buckets}
        long_documents = dict.fromkeys(self.buckets, 0)
        for job in jobs:
            bucket = merged_bucket(job)
            assert bucket is not None, f"{job.file} isn't merged"
            if bucket.shard:
                shards[job.split][str(job.file.relative_to(self.folder))] = bucket.shard
            long_documents[job.split] += bucket.long_documents
            counts = documents[job.split]
            for name, count in bucket.documents.items():
                counts[name] = counts.get(name, DocumentCounts()) + count
        for split, written in shards.items():
            if not written:
                raise EmptySplit(self._nothing_left(split, long_documents[split]))
        lost = sum(unit.lost_characters for unit in units.values())
        writer = PackedCacheWriter(
            self.folder,
            vocabulary=self.vocabulary,
            sequence_length=self.plan.sequence_length,
            subsets=settings.subsets,
            settings={
                "packing": self.plan.packing,
                "seed": self.plan.seed,
                "drop_duplicates": self.drop_duplicates,
                **self._long_documents(long_documents),
                **({"lost_characters": lost} if lost else {}),
            },
            sources=[sources[path].as_source() for path in sorted(sources)],
            begun=True,
        )
        for split, written in shards.items():
            writer.add_split(split, written, documents[split])
        writer.finish()
        discard_work(self.folder)

    def _long_documents(self, counted: Mapping[str, int]) -> dict[str, Any]:
        """What the manifest says of documents longer than a row, where they are not split."""
        if self.plan.long_documents == "split":
            return {}
        return {"long_documents": {"handling": self.plan.long_documents, "by_split": counted}}

    def _nothing_left(self, split: str, too_long: int) -> str:
        if too_long:
            return (
                f"All {too_long:,} documents of the {split} split that no other has are longer "
                f"than a row of {self.plan.sequence_length} tokens: raise sequence_length, or set "
                "long_documents to 'cut'."
            )
        return (
            f"Every text of the {split} split is in another split too, and splits are kept apart: "
            "correct the task's files."
        )


class EmptySplit(InputError):  # noqa: N818 (says what was found)
    """A split has no documents: no other start with the same text can go on from here."""


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


def _described(unit: Unit) -> str:
    return f"{unit.name} ({', '.join(map(str, getattr(unit, 'paths', ())[:3]))})"
