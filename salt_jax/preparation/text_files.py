"""Text files as the splits of a corpus.

A split has its own patterns, or is a fraction held out of the train files. Held-out documents are
chosen by a hash of their text, so equal texts are always in one split, whatever the order and
number of files. If a split of a tiny corpus would be empty, it gets a document that the hash
assigns to another split.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from salt_jax.data.file_kinds import kind_of
from salt_jax.data.packed_cache import SPLITS
from salt_jax.errors import InputError, nearest, visible
from salt_jax.preparation.file_patterns import names_of, once, real_paths
from salt_jax.preparation.readers import Document, read_documents
from salt_jax.preparation.reading_log import ReadingLog, source_digest
from salt_jax.preparation.templates import Template
from salt_jax.storage.buckets import path_of, state_of
from salt_jax.terminal import say


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files as the splits of a task.

    Attributes:
      train: Pattern or patterns ("corpus/**/*.jsonl.zst"); ** crosses folders, ~ is home, gs:// and
        s3:// name buckets. Each file is read once, whatever links lead to it.
      validation: Patterns of the validation split.
      test: Patterns of the test split.
      validation_fraction: Instead of `validation`: the fraction of the train files' documents to
        hold out, chosen by a hash of the text.
      test_fraction: The same for the test split.
      exclude: Patterns of paths to leave out ("*/site-packages/*").
      subsets: The allowed subset names; by default any, which takes an extra pass over the files.
      default_subset: The name for rows without one.
      max_documents: The most documents to read from each split's files; 0 reads all.
      max_bytes: The most text (UTF-8 bytes) to read from each split's files; 0 reads all. With
        either limit, files are read in the order of a hash of their path, to get a sample rather
        than the alphabetically first.
      piece_bytes: Plain text files are cut at line ends into documents of about this size; 0
        doesn't cut.
      skip_broken_lines: Whether to skip and count malformed lines instead of refusing them.
      train_shards: How many numbered shards (00.jsonl.zst, 01.jsonl.zst, …) the train files must
        be, 0 for any number; none may be missing or duplicated. By default they are not shards.
      template: Turns a row into a document: its `text`, or a prompt and a response from other
        fields.
    """

    train: str | Sequence[str]
    validation: str | Sequence[str] = ()
    test: str | Sequence[str] = ()
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    exclude: str | Sequence[str] = ()
    subsets: Sequence[str] = ()
    default_subset: str = "text"
    max_documents: int = 0
    max_bytes: int = 0
    piece_bytes: int = 0
    skip_broken_lines: bool = False
    train_shards: int | None = None
    template: Template = Template()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        for field in (*SPLITS, "exclude"):
            value = getattr(self, field)
            patterns = (value,) if isinstance(value, str | os.PathLike) else tuple(value)
            object.__setattr__(self, field, tuple(filter(None, map(os.fspath, patterns))))
        object.__setattr__(self, "subsets", tuple(self.subsets))
        if not self.train:
            raise InputError("TextFiles.train names no files: set it to a pattern of files.")
        for split in ("validation", "test"):
            fraction = getattr(self, f"{split}_fraction")
            if not 0 <= fraction < 1:
                raise InputError(
                    f"{split}_fraction is {fraction}, expected 0 or more and less than 1: change "
                    f"--{split}_fraction."
                )
            if fraction and getattr(self, split):
                raise InputError(
                    f"Both {split} files and a {split}_fraction of {fraction} are given: "
                    "set one of the two."
                )
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError(
                f"validation_fraction {self.validation_fraction} and test_fraction "
                f"{self.test_fraction} leave nothing to train on: lower them."
            )
        for field in ("max_documents", "max_bytes", "piece_bytes"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}, expected 0 or more.")

    def as_plain_text(self) -> "TextFiles":
        """A copy that treats names of special tokens in prompts and responses as plain text."""
        template = dataclasses.replace(self.template, parse_special=False)
        return dataclasses.replace(self, template=template) if self.template.prompt else self

    @property
    def splits(self) -> tuple[str, ...]:
        """Its splits, train first."""
        return tuple(
            split
            for split in SPLITS
            if getattr(self, split) or getattr(self, f"{split}_fraction", 0)
        )

    @property
    def splits_with_files(self) -> tuple[str, ...]:
        """The splits with their own files, train first."""
        return tuple(split for split in SPLITS if getattr(self, split))

    def splits_from(self, split: str) -> tuple[str, ...]:
        """The splits whose documents come from a split's files."""
        held_out = [other for other in self.splits if not getattr(self, other)]
        return ("train", *held_out) if split == "train" else (split,)

    def files(self, split: str) -> list[pathlib.Path]:
        """The files of a split, in reading order; InputError if a pattern matches no file, a file
        is in another split too, or a shard is missing."""
        found = self._found(split)
        files = sorted(found)
        if self.train_shards is not None and (split == "train" or not getattr(self, split)):
            _refuse_missing_shard(files, self.train_shards)
        for other in SPLITS[: SPLITS.index(split)]:
            if getattr(self, split) and getattr(self, other):
                others = {real: file for file, real in self._found(other).items()}
                for file in files:
                    if also := others.get(found[file]):
                        name = f" (as {also})" if also != file else ""
                        raise InputError(
                            f"{file} is both a {other}{name} and a {split} file: "
                            "make the patterns disjoint, or hold out a fraction instead."
                        )
        if self.max_documents or self.max_bytes:
            files.sort(key=lambda file: hashlib.sha256(str(file).encode()).digest())
        return files

    def all_files(self) -> list[pathlib.Path]:
        """The files of all splits, sorted, without duplicates."""
        return sorted({file for split in self.splits for file in self.files(split)})

    def sources(self) -> list[dict[str, Any]]:
        """Each file's name, bytes and digest, as in a manifest."""
        return [source.as_source() for source in ReadingLog().sources(self.all_files())]

    def documents(self, split: str, log: ReadingLog | None = None) -> Iterator[Document]:
        """The split's non-empty documents, in a fixed order; `log` records the files' digests and
        the lines skipped. InputError as `files` and `read_documents`, or if a subset name is not
        allowed."""
        for document in self.read(self.files(split), log):
            if self.split_of(document.whole, split) == split:
                yield document

    def read(
        self, files: Iterable[pathlib.Path], log: ReadingLog | None = None
    ) -> Iterator[Document]:
        """The non-empty documents of some of the files, up to the limits; see `documents`."""
        documents, text_bytes = 0, 0
        for file in files:
            for document in read_documents(
                file,
                skip_broken_lines=self.skip_broken_lines,
                log=log,
                piece_bytes=self.piece_bytes,
                template=self.template,
            ):
                if not document.text:
                    continue
                documents += 1
                text_bytes += len(document.whole.encode())
                if (self.max_documents and documents > self.max_documents) or (
                    self.max_bytes and text_bytes > self.max_bytes
                ):
                    return
                yield self._named(document)

    def split_of(self, text: str, asked: str) -> str:
        """The split of a text in the files of the split `asked`."""
        if getattr(self, asked) and asked != "train":
            return asked
        if not self.validation_fraction and not self.test_fraction:
            return "train"
        place = _place(text)
        return self._moved.get(place) or self._split_at(place)

    def settled(self) -> "TextFiles":
        """Returns itself, with the data of `split_of` precomputed for pickled copies."""
        if self.validation_fraction or self.test_fraction:
            _ = self._moved  # cached in the object, and pickled with it
        return self

    def subset_names(self) -> tuple[str, ...]:
        """The subset names, sorted: those allowed, or those found in the files of all splits."""
        if self.subsets:
            return tuple(self.subsets)
        names = {
            document.subset
            for split in self.splits_with_files
            for document in self.read(self.files(split))
        }
        return tuple(sorted(names))

    def refuse_equal_shards(self) -> None:
        """If the train files are shards, refuses two of equal content; only files of equal size are
        read."""
        by_size: dict[int, list[pathlib.Path]] = {}
        for file in () if self.train_shards is None else self.all_files():
            by_size.setdefault(state_of(file)[0], []).append(file)
        for files in by_size.values():
            seen: dict[str, pathlib.Path] = {}
            for file in files if len(files) > 1 else ():
                other = seen.setdefault(source_digest(file), file)
                if other is not file:
                    raise InputError(
                        f"{file} has the same content as {other}, so one of them is not the shard "
                        "that its name says: fetch it again."
                    )

    def listed(self, **changes: Any) -> "TextFiles":
        """A copy, with changes, that caches the expansion of each pattern: in a bucket that takes a
        request per thousand files."""
        files = dataclasses.replace(self, **changes)
        object.__setattr__(files, "_known", dict(getattr(self, "_known", {})))
        return files

    def __getstate__(self) -> dict[str, Any]:
        # Other processes are told which files to read, and needn't expand patterns.
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    def _found(self, split: str) -> dict[pathlib.Path, str]:
        """The files of a split, with their real paths."""
        patterns = getattr(self, split) or self.train
        known: dict[Any, dict[pathlib.Path, str]] = getattr(self, "_known", {})
        key = (patterns, self.exclude)
        if key not in known:
            known[key] = self._expand(patterns)
        return known[key]

    def _expand(self, patterns: Sequence[str]) -> dict[pathlib.Path, str]:
        found: set[pathlib.Path] = set()
        left_out: dict[str, str] = {}
        for pattern in patterns:
            names = [name for name in names_of(pattern, left_out) if not self._excludes(name)]
            if not names:
                raise InputError(
                    f"No file matches {pattern!r}, a pattern of TextFiles: correct it, or the "
                    "working directory."
                )
            found.update(map(path_of, names))
        for file in found:
            kind_of(file)  # refuses files that are not text before anything is read
        if self.train_shards is not None:
            return real_paths(found)  # a shard that is a link to another is refused later
        files = once(found, left_out)
        _report_left_out(files, left_out)
        return files

    def _excludes(self, name: str) -> bool:
        return any(
            fnmatch.fnmatch(name, exclude) or fnmatch.fnmatch(name, exclude.replace("[", "[[]"))
            for exclude in self.exclude
        )

    def _named(self, document: Document) -> Document:
        name = document.subset or self.default_subset
        if self.subsets and name not in self.subsets:
            got = f"the subset name {document.subset!r}" if document.subset else "no subset name"
            raise InputError(
                f"{document.place}: {got}, expected one of the {len(self.subsets)} of the "
                f"task{nearest(name, self.subsets)}: correct meta.pile_set_name, or use a task "
                "that allows any subset name."
            )
        return document._replace(subset=name)

    def _split_at(self, place: float) -> str:
        if place < self.validation_fraction:
            return "validation"
        return "test" if place < self.validation_fraction + self.test_fraction else "train"

    @functools.cached_property
    def _moved(self) -> Mapping[float, str]:
        """The hashes of texts that are moved to splits that would otherwise be empty.

        Such a split gets the text with the lowest hash of the largest split. The train files are
        read only until each split has a text.
        """
        places: dict[str, set[float]] = {
            split: set() for split in self.splits if split == "train" or not getattr(self, split)
        }
        for document in self.read(self.files("train")):
            place = _place(document.whole)
            places[self._split_at(place)].add(place)
            if all(places.values()):
                return {}
        moved = {}
        for split in [split for split, own in places.items() if not own]:
            most = max(places.values(), key=len)
            if len(most) > 1:
                place = min(most)
                most.remove(place)
                places[split].add(place)
                moved[place] = split
        return moved


def _report_left_out(files: Iterable[pathlib.Path], left_out: Mapping[str, str]) -> None:
    """Prints which duplicate names of files and folders were left out."""
    places = {str(place) for file in files for place in (file, *file.parents)} if left_out else ()
    names = sorted(name for name, kept in left_out.items() if kept in places)
    if names:
        say(
            f"Each file is read once; names left out: {len(names):,}, such as "
            f"{visible(names[0])}, which is {visible(left_out[names[0]])}."
        )


def _refuse_missing_shard(files: Sequence[pathlib.Path], expected: int) -> None:
    """Refuses a missing or duplicate shard number, and fewer shards than expected; files whose
    names are not numbers don't count."""
    folder = files[0].parent
    numbers: dict[int, str] = {}
    for stem in (file.name.partition(".")[0] for file in files):
        if not stem.isdecimal():
            continue
        if int(stem) in numbers:
            raise InputError(
                f"The shard {int(stem)} is there twice in {folder}, as "
                f"{numbers[int(stem)]} and {stem}: remove one of them."
            )
        numbers[int(stem)] = stem
    last = max(numbers, default=-1)
    if len(numbers) < expected and last < expected - 1:
        raise InputError(
            f"{folder} has {len(numbers)} shards, expected {expected}: fetch the others, or set "
            "pile_files.train_shards to the number that is there."
        )
    for number in range(last):
        if number not in numbers:
            raise InputError(
                f"The shard {number:0{len(numbers[last])}d} is missing in {folder}, which has "
                f"shards up to {numbers[last]}: fetch it."
            )


def _place(text: str) -> float:
    """A text's hash as a number between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
