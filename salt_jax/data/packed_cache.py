"""The packed cache: fixed-length rows of tokens, shuffled once, each with a stable id.

In (writer): rows in their final order, split by split. Out: a folder

    train/rows-00000-of-00004.array_record …   one record a row (row_records.py), uncompressed
    validation/…  test/…
    vocabulary/                                what load_vocabulary reads
    manifest.json  COMPLETED                   counts, digests, tokenizer fingerprint, settings

In (reader): that folder. Out: rows by id, as Grain reads them; no TensorFlow, no JAX. A row's id is
its index in its split: row 0 is the first record of the first shard.
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from array_record.python import array_record_data_source

from salt_jax.data.cache_shards import (
    SHARD_FILE,
    DocumentCounts,
    ShardCounts,
    shard_path,
    split_info,
    write_shard,
)
from salt_jax.data.features import Row
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.vocabularies import (
    VOCABULARY_FILES,
    VOCABULARY_FOLDER,
    Vocabulary,
    load_vocabulary,
)
from salt_jax.errors import InputError
from salt_jax.storage.json_files import inside, no_link_out
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.manifests import (
    MANIFEST_FILE,
    begin_writing,
    file_digest,
    json_digest,
    new_manifest,
    read_manifest,
    write_manifest,
)

KIND = "packed_cache"
_AGAIN = "copy the cache again, or make it again with `salt prepare`"
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A whole ArrayRecord file, in the words of ArrayRecordDataSource."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


class PackedSplit:
    """The rows of one split by row id. A Grain RandomAccessDataSource; can be pickled.

    Attributes:
      name: "train", "validation" or "test".
      info: The split's part of the manifest: rows, tokens, documents, bytes, shared_documents,
        duplicate_documents, by_subset, shards.
    """

    def __init__(
        self, folder: pathlib.Path, name: str, info: Mapping[str, Any], record_format: RecordFormat
    ):
        self.name = name
        self.info = info
        self._folder = folder
        self._format = record_format
        shards = [_Shard(str(folder / shard["file"]), shard["rows"]) for shard in info["shards"]]
        self._records = array_record_data_source.ArrayRecordDataSource(shards)

    def __len__(self) -> int:
        return self.info["rows"]

    def __getitem__(self, row_id: SupportsIndex) -> Row:
        index = self._checked(row_id)
        with self._refusing_damage():
            record = self._records[index]
        return self._format.decode(record, index)

    def __getitems__(self, row_ids: Sequence[SupportsIndex]) -> list[Row]:
        """Rows in the order asked for; reads several shards at once."""
        ids = [self._checked(row_id) for row_id in row_ids]
        with self._refusing_damage():
            records = self._records.__getitems__(ids)
        return [
            self._format.decode(record, row_id) for record, row_id in zip(records, ids, strict=True)
        ]

    @contextlib.contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        """What the library raises for bytes that it didn't write, in a sentence."""
        try:
            yield
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise InputError(
                f"The {self.name} split of the cache {self._folder} cannot be read ({error}): "
                f"{_AGAIN}."
            ) from error

    def __repr__(self) -> str:
        return f"PackedSplit({str(self._folder)!r}, {self.name!r}, rows={len(self)})"

    def _checked(self, row_id: SupportsIndex) -> int:
        index = operator.index(row_id)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows of the {self.name} split")
        return index


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """A finished packed cache; make one with `PackedCache.open`.

    Attributes:
      path: Its folder.
      manifest: As written.
      digest: What scores and selections name it by: the manifest's digest, shards' digests
        included.
    """

    path: pathlib.Path
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PackedCache":
        """Opens a cache; file sizes and row counts are checked, contents by `verify`.

        Raises:
          InputError: Not there, half-written, another kind or version, a shard missing, cut short
            or outside of the folder.
        """
        folder = local_folder(path)
        manifest = read_manifest(folder, KIND)
        cache = cls(folder, manifest, json_digest(manifest))
        cache._refuse_contradictions()
        for shard in cache._shards():
            file = inside(cache.path, shard["file"], _AGAIN)
            found = f"has {file.stat().st_size:,} bytes" if file.exists() else "does not exist"
            if found != f"has {shard['bytes']:,} bytes":
                raise InputError(
                    f"The shard {file} {found}, expected {shard['bytes']:,} bytes: "
                    "copy the cache again, or make it again with `salt prepare`."
                )
        if not no_link_out(cache.path, cache.path / VOCABULARY_FOLDER, _AGAIN).is_dir():
            raise InputError(
                f"The cache {cache.path} has lost its {VOCABULARY_FOLDER}/: copy it again, or make "
                "it again with `salt prepare`."
            )
        return cache

    @property
    def sequence_length(self) -> int:
        """Tokens a row."""
        return self.manifest["sequence_length"]

    @property
    def subsets(self) -> tuple[str, ...]:
        """The subsets' names; a row's `subset` is an index in it."""
        return tuple(self.manifest["subsets"])

    @property
    def vocabulary_size(self) -> int:
        """All ids, special and reserved ones included."""
        return self.manifest["vocabulary"]["size"]

    @property
    def vocabulary_fingerprint(self) -> str:
        """What two models must share to be teacher and student."""
        return self.manifest["vocabulary"]["fingerprint"]

    @property
    def start_id(self) -> int:
        """What a model reads before a segment's first token."""
        return self.manifest["vocabulary"]["start_id"]

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary kept in the cache."""
        return load_vocabulary(self.path / VOCABULARY_FOLDER)

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits it holds."""
        return tuple(name for name in SPLITS if name in self.manifest["splits"])

    def split(self, name: str) -> PackedSplit:
        """The rows of a split.

        Raises:
          InputError: The cache has no such split.
        """
        if name not in self.manifest["splits"]:
            raise InputError(
                f"The cache {self.path} has no split {name!r}, it has "
                f"{', '.join(self.split_names)}: "
                "name one of these, or prepare the text with that split."
            )
        record_format = RecordFormat(self.sequence_length, self.vocabulary_size)
        return PackedSplit(self.path, name, self.manifest["splits"][name], record_format)

    def verify(self) -> None:
        """Reads vocabulary and shards and compares their digests with the manifest's.

        Raises:
          InputError: The vocabulary or a shard's bytes have changed.
        """
        if self.vocabulary.fingerprint != self.vocabulary_fingerprint:
            raise InputError(
                f"The vocabulary of {self.path} has the fingerprint "
                f"{self.vocabulary.fingerprint[:12]}…, its manifest says "
                f"{self.vocabulary_fingerprint[:12]}…: copy the cache again, or make it again."
            )
        for shard in self._shards():
            digest = file_digest(self.path / shard["file"])
            if digest != shard["digest"]:
                raise InputError(
                    f"The shard {self.path / shard['file']} has the digest {digest[:12]}…, "
                    f"its manifest says {shard['digest'][:12]}…: copy the cache again, "
                    "or make it again."
                )

    def _refuse_contradictions(self) -> None:
        """Refuses counts that cannot all be right: reading would go wrong far from here."""
        file = self.path / MANIFEST_FILE
        for name in ("sequence_length", "subsets", "splits"):
            if not self.manifest[name]:
                raise InputError(f"{file}: {name} is {self.manifest[name]}: {_AGAIN}.")
        for name, info in self.manifest["splits"].items():
            rows = sum(shard["rows"] for shard in info["shards"])
            if rows != info["rows"] or name not in SPLITS:
                raise InputError(
                    f"{file}: the split {name!r} has {info['rows']} rows and its shards {rows}, "
                    f"expected the same of {', '.join(SPLITS)}: {_AGAIN}."
                )

    def _shards(self) -> list[dict[str, Any]]:
        return [shard for info in self.manifest["splits"].values() for shard in info["shards"]]


class PackedCacheWriter:
    """Writes a packed cache: each split once, then `finish`. Until then no reader accepts the
    folder.

    Example:
      writer = PackedCacheWriter(folder, vocabulary=ByteVocabulary(), sequence_length=128)
      writer.write_split("train", rows, num_rows=len(rows))
      manifest = writer.finish()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        vocabulary: Vocabulary,
        sequence_length: int,
        subsets: Sequence[str] = ("text",),
        shards: int = 1,
        settings: Mapping[str, Any] | None = None,
        sources: Sequence[Mapping[str, Any]] = (),
        begun: bool = False,
    ):
        """Begins a cache.

        Args:
          folder: Where it will lie. A cache begun there before is removed; files that a writer
            doesn't make are left alone, whatever folder they are in.
          vocabulary: Saved beside the rows.
          sequence_length: L, tokens a row.
          subsets: Names; a row's subset is an index in them.
          shards: Files a split is cut into, where it has so many rows.
          settings: What else the manifest records (packing, seed); part of the cache's digest.
          sources: The input files, each {"file", "bytes", "digest"}.
          begun: Whether shards of this cache are there already, written by `write_shard` after
            `begin_cache`.
        """
        self._folder = pathlib.Path(folder)
        self._format = RecordFormat(sequence_length, vocabulary.size)
        self._subsets = tuple(subsets)
        self._shards = shards
        self._splits: dict[str, Any] = {}
        self._manifest = new_manifest(
            KIND,
            **{"packing": None, "seed": None, **(settings or {})},
            sequence_length=sequence_length,
            subsets=list(self._subsets),
            vocabulary=vocabulary.describe(),
            sources=list(sources),
        )
        if not begun:
            begin_cache(self._folder)
        vocabulary.save(self._folder / VOCABULARY_FOLDER)

    def write_split(
        self,
        name: str,
        rows: Iterable[Row],
        *,
        num_rows: int,
        documents: Mapping[str, DocumentCounts] | None = None,
    ) -> None:
        """Writes a split's rows in the order given, which numbers them.

        Args:
          name: "train", "validation" or "test".
          rows: Exactly `num_rows` rows; their row_id is ignored.
          num_rows: Rows of the split, at least 1.
          documents: What they were made from, by the subset's name.
        """
        assert name in SPLITS, f"a split is one of {SPLITS}, got {name!r}"
        assert num_rows > 0, f"the {name} split has no rows"
        shards = min(self._shards, num_rows)
        bounds = [num_rows * shard // shards for shard in range(shards + 1)]
        iterator = iter(rows)
        written = {}
        for shard, (start, end) in enumerate(itertools.pairwise(bounds)):
            file = shard_path(self._folder, name, shard, shards)
            own = itertools.islice(iterator, end - start)
            written[f"{name}/{file.name}"] = write_shard(file, own, self._format, self._subsets)
        assert next(iterator, None) is None, f"more than {num_rows} rows for the {name} split"
        assert sum(shard.rows for shard in written.values()) == num_rows, f"too few rows for {name}"
        self.add_split(name, written, documents or {})

    def add_split(
        self,
        name: str,
        shards: Mapping[str, ShardCounts],
        documents: Mapping[str, DocumentCounts],
    ) -> None:
        """Adds a split whose shards are written.

        Args:
          name: "train", "validation" or "test".
          shards: By their path in the cache, in the order of their rows.
          documents: What they were made from, by the subset's name.
        """
        self._splits[name] = split_info(shards, documents)

    def finish(self) -> dict[str, Any]:
        """Writes the manifest and COMPLETED, and gives the manifest."""
        manifest = {**self._manifest, "splits": self._splits}
        write_manifest(self._folder, manifest)
        return manifest


def begin_cache(folder: pathlib.Path) -> None:
    """Begins a cache: one begun there before is removed, known by its files' names; nothing else
    is.

    Raises:
      InputError: A part of it is a link that leads out of the folder.
    """
    for name in (*SPLITS, VOCABULARY_FOLDER):
        no_link_out(folder, folder / name, "choose another --output_dir")
    begin_writing(folder)
    for name in (*SPLITS, VOCABULARY_FOLDER):
        if not (folder / name).is_dir():
            continue
        files = list((folder / name).iterdir())
        if name == VOCABULARY_FOLDER:
            own = [file for file in files if file.name in VOCABULARY_FILES]
        else:
            own = [file for file in files if SHARD_FILE.fullmatch(file.name)]
        for file in own:
            file.unlink()
        if own == files and not (folder / name).is_symlink():
            (folder / name).rmdir()
