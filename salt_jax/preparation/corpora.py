"""Divides a corpus into units of work.

A unit is a text file, several small ones, or a shard of a SeqIO source, independent of the worker
that maps it. With a limit on the text (max_documents, max_bytes), a split's files are one unit.

SeqIO defines a document's ids; a unit of text files gives the same ids without SeqIO, so that
preparing text needs no TensorFlow.
"""

import abc
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.data.file_kinds import kind_of
from salt_jax.data.packed_cache import SPLITS
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.preparation.part_files import TokenizedDocument, token_dtype
from salt_jax.preparation.reading_log import ReadingLog, SourceFile
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.buckets import path_of, state_of

# Small files are grouped up to about this much text.
_UNIT_TEXT_BYTES = 8_000_000
# Bytes of text per byte of a file, roughly.
_EXPANSION = {"zstandard": 4.0, "xz": 4.0, "bzip2": 4.0, "gzip": 3.0}
_PARQUET_EXPANSION = 3.0


@dataclasses.dataclass(frozen=True)
class Unit(abc.ABC):
    """A part of a corpus that is tokenized on its own: the name of its part file, and the split
    whose files it is read from."""

    name: str
    split: str

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that its documents may belong to."""
        return (self.split,)

    def identity(self) -> dict[str, Any]:
        """The settings that its documents depend on, as JSON values."""
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def documents(self, vocabulary: Vocabulary, log: ReadingLog) -> Iterator[TokenizedDocument]:
        """Its documents, tokenized; InputError, with file and line, for malformed text."""

    @abc.abstractmethod
    def sources(self, log: ReadingLog) -> list[SourceFile]:
        """The files read, as recorded in `log`; InputError if one changed while it was read."""


@dataclasses.dataclass(frozen=True)
class TextUnit(Unit):
    """Some text files of one split, in order; held-out documents come from train's files."""

    text: TextFiles
    paths: tuple[str, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return self.text.splits_from(self.split)

    @property
    def files(self) -> list[pathlib.Path]:
        """Its files."""
        return list(map(path_of, self.paths))

    def identity(self) -> dict[str, Any]:
        """See Unit. Doesn't depend on skip_broken_lines."""
        identity = super().identity()
        del identity["text"]["skip_broken_lines"]
        return identity

    def documents(self, vocabulary: Vocabulary, log: ReadingLog) -> Iterator[TokenizedDocument]:
        """See Unit."""
        dtype = token_dtype(vocabulary.size)
        template = self.text.template
        special = template.parse_special and bool(template.prompt)
        for document in self.text.read(self.files, log):
            if vocabulary.drop_unknown:
                texts = (document.prompt, document.text)
                log.lost_characters += sum(map(vocabulary.lost_characters, texts))
            # Tokenized separately, since at inference a model gets the prompt alone.
            prompt_P = vocabulary.encode(document.prompt, special) if document.prompt else []
            text_T = vocabulary.encode(document.text, special)
            yield TokenizedDocument(
                np.array([*prompt_P, *text_T, vocabulary.eos_id], dtype),
                self.text.split_of(document.whole, self.split),
                document.subset,
                hashlib.blake2b(document.whole.encode(), digest_size=16).digest(),
                len(document.text.encode()),
                len(prompt_P),
            )

    def sources(self, log: ReadingLog) -> list[SourceFile]:
        """See Unit."""
        return log.sources(self.files)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus as units, in its order.

    Attributes:
      sizes: Size of each split relative to the others, in bytes or shards.
      subsets: The subsets' names if they are known beforehand.
      text_bytes: Bytes of text, roughly; 0 if unknown.
      has_prompts: Whether documents begin with a prompt, which is masked out of the loss.
    """

    units: tuple[Unit, ...]
    sizes: Mapping[str, float]
    subsets: tuple[str, ...] | None = None
    text_bytes: float = 0
    has_prompts: bool = False

    def buckets(self, shards: int) -> dict[str, int]:
        """The number of shards of each split: `shards` for train, others in proportion to size."""
        train = self.sizes["train"] if "train" in self.sizes else max(self.sizes.values())
        share = {split: round(shards * size / max(train, 1)) for split, size in self.sizes.items()}
        return {split: max(1, share[split]) for split in SPLITS if split in share}


def text_corpus(text: TextFiles) -> Corpus:
    """The corpus of text files; InputError as `TextFiles.files`."""
    text = text.settled()
    units: list[Unit] = []
    sizes: dict[str, float] = {}
    for split in text.splits_with_files:
        files = text.files(split)
        size = sum(map(_text_bytes, files))
        if text.max_bytes:
            size = min(size, text.max_bytes)
        fractions = {"validation": text.validation_fraction, "test": text.test_fraction}
        held_out = {s: fractions[s] for s in text.splits_from(split) if s != split}
        sizes |= {s: size * fraction for s, fraction in held_out.items()}
        sizes[split] = size * (1 - sum(held_out.values()))
        groups = [files] if text.max_documents or text.max_bytes else _grouped(files)
        units += [
            TextUnit(f"{split}-{number:05d}", split, text, tuple(map(str, group)))
            for number, group in enumerate(groups)
        ]
    known = 0.0 if text.max_documents else sum(sizes.values())
    prompts = bool(text.template.prompt)
    return Corpus(tuple(units), sizes, tuple(text.subsets) or None, known, prompts)


def _grouped(files: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
    """Groups neighbouring files until they hold enough text for a unit."""
    groups: list[list[pathlib.Path]] = []
    held = 0.0
    for file in files:
        size = _text_bytes(file)
        if not groups or held + size > _UNIT_TEXT_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(file)
        held += size
    return groups


def _text_bytes(file: pathlib.Path) -> float:
    kind = kind_of(file)
    plain = _PARQUET_EXPANSION if kind.suffix == ".parquet" else 1.0
    return state_of(file)[0] * _EXPANSION.get(kind.compression, plain)
