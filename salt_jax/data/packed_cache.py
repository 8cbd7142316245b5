"""The packed cache: fixed-length rows of tokens, shuffled once, each with a stable id.

A cache is a folder, read without TensorFlow and JAX:

    train/rows-00000-of-00004.array_record …   one record a row (row_records.py), uncompressed
    validation/…  test/…
    vocabulary/                                for load_vocabulary
    manifest.json  COMPLETED                   counts, digests, tokenizer fingerprint, settings

A row's id is its index in its split: row 0 is the first record of the first shard.
"""

import dataclasses
import functools
import operator
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from array_record.python import array_record_data_source

from salt_jax.data.cache_shards import SHARD_FILE, DocumentCounts, ShardCounts, split_info
from salt_jax.data.features import Row
from salt_jax.data.remote_records import RemoteRecords
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.vocabularies import (
    VOCABULARY_FILES,
    VOCABULARY_FOLDER,
    Vocabulary,
    load_vocabulary,
)
from salt_jax.errors import InputError
from salt_jax.storage.block_copies import InputFolder
from salt_jax.storage.json_files import no_link_out
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


class PackedSplit:
    """The rows of one split by row id: a picklable Grain RandomAccessDataSource; `info` is the
    split's entry in the manifest."""

    def __init__(
        self, folder: InputFolder, name: str, info: Mapping[str, Any], record_format: RecordFormat
    ):
        self.name = name
        self.info = info
        self._folder = folder
        self._format = record_format
        if folder.remote is not None:
            self._records: Any = RemoteRecords(folder, info["shards"])
            return
        whole_files = [
            types.SimpleNamespace(
                filename=str(folder.path / shard["file"]),
                examples_in_shard=shard["rows"],
                **{"skip": 0, "take": shard["rows"]},
            )
            for shard in info["shards"]
        ]
        self._records = array_record_data_source.ArrayRecordDataSource(whole_files)

    def __len__(self) -> int:
        return self.info["rows"]

    def __getitem__(self, row_id: SupportsIndex) -> Row:
        return self.__getitems__([row_id])[0]

    def __getitems__(self, row_ids: Sequence[SupportsIndex]) -> list[Row]:
        """The rows in the order asked for; shards are read in parallel."""
        ids = [operator.index(row_id) for row_id in row_ids]
        for index in ids:
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)} rows of the {self.name} split")
        try:
            records = self._records.__getitems__(ids)
        except InputError:  # of the bucket
            raise
        # The library's errors for a corrupt file.
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            what = f"The {self.name} split of the cache {self._folder.url} cannot be read ({error})"
            raise InputError(f"{what}: {_AGAIN}.") from error
        return [self._format.decode(record, i) for record, i in zip(records, ids, strict=True)]

    def __repr__(self) -> str:
        return f"PackedSplit({self._folder.url!r}, {self.name!r}, rows={len(self)})"


@dataclasses.dataclass(frozen=True)
class PackedCache:
    """A finished packed cache; make one with `PackedCache.open`. Scores and selections refer to it
    by its manifest's digest."""

    folder: InputFolder
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PackedCache":
        """Opens a cache; checks file sizes and row counts (`verify` checks contents). InputError if
        it is missing, half-written, or of another kind or version, or a shard is missing, truncated
        or outside the folder."""
        folder = InputFolder(path, _is_shard)
        manifest = read_manifest(folder.path, KIND)
        cache = cls(folder, manifest, json_digest(manifest))
        _refuse_contradictions(folder.path / MANIFEST_FILE, manifest)
        shards = {shard["file"]: shard["bytes"] for shard in cache._shards()}
        sizes = folder.sizes(shards, _AGAIN)
        for file, expected in shards.items():
            if sizes.get(file) != expected:
                found = f"has {sizes[file]:,} bytes" if file in sizes else "does not exist"
                raise InputError(
                    f"The shard {folder.url}/{file} {found}, expected {expected:,} bytes: {_AGAIN}."
                )
        if not no_link_out(cache.path, cache.path / VOCABULARY_FOLDER, _AGAIN).is_dir():
            raise InputError(f"The cache {cache.path} has lost its {VOCABULARY_FOLDER}/: {_AGAIN}.")
        return cache

    @property
    def path(self) -> pathlib.Path:
        """Its folder on disk or, for a cache in a bucket, that of the copies of its small files."""
        return self.folder.path

    @property
    def sequence_length(self) -> int:
        """Tokens per row."""
        return self.manifest["sequence_length"]

    @property
    def subsets(self) -> tuple[str, ...]:
        """The subsets' names; a row's `subset` is an index into them."""
        return tuple(self.manifest["subsets"])

    @property
    def vocabulary_size(self) -> int:
        """All ids, special and reserved ones included."""
        return self.manifest["vocabulary"]["size"]

    @property
    def vocabulary_fingerprint(self) -> str:
        """The vocabulary's fingerprint, which a teacher and its student share."""
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
        """The rows of a split; an InputError if the cache has no such split."""
        if name not in self.manifest["splits"]:
            raise InputError(
                f"The cache {self.path} has no split {name!r}, it has "
                f"{', '.join(self.split_names)}: name one of these, or prepare the text with it."
            )
        record_format = RecordFormat(self.sequence_length, self.vocabulary_size)
        return PackedSplit(self.folder, name, self.manifest["splits"][name], record_format)

    def verify(self) -> None:
        """Reads the vocabulary and all shards, and compares their digests with the manifest's."""
        vocabulary = f"The vocabulary of {self.path} has the fingerprint"
        compared = [(vocabulary, self.vocabulary.fingerprint, self.vocabulary_fingerprint)]
        for shard in self._shards():
            file = self.folder.whole(shard["file"])
            compared += [
                (
                    f"The shard {self.folder.url}/{shard['file']} has the digest",
                    file_digest(file),
                    shard["digest"],
                )
            ]
        for what, found, expected in compared:
            if found != expected:
                said = f"its manifest says {expected[:12]}…"
                raise InputError(f"{what} {found[:12]}…, {said}: {_AGAIN}.")

    def _shards(self) -> list[dict[str, Any]]:
        return [shard for info in self.manifest["splits"].values() for shard in info["shards"]]


def begin_cache(folder: pathlib.Path) -> None:
    """Removes a cache begun in the folder before, and no other file; InputError if a part of it is
    a link that leads out of the folder."""
    parts = (*SPLITS, VOCABULARY_FOLDER)
    for name in parts:
        no_link_out(folder, folder / name, "choose another --output_dir")
    begin_writing(folder)
    for path in (folder / name for name in parts if (folder / name).is_dir()):
        of_vocabulary = path.name == VOCABULARY_FOLDER
        for file in path.iterdir():
            if file.name in VOCABULARY_FILES if of_vocabulary else SHARD_FILE.fullmatch(file.name):
                file.unlink()
        if not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def finish_cache(
    folder: pathlib.Path,
    splits: Mapping[str, tuple[Mapping[str, ShardCounts], Mapping[str, DocumentCounts]]],
    *,
    vocabulary: Vocabulary,
    sequence_length: int,
    subsets: Sequence[str] = ("text",),
    sources: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Writes the vocabulary, the manifest and COMPLETED; returns the manifest.

    Args:
      folder: The cache's folder, prepared by `begin_cache`.
      splits: Each split's shards and documents, as `split_info` takes them.
      vocabulary: Saved beside the rows.
      sequence_length: L, tokens per row.
      subsets: Names; a row's subset is an index into them.
      sources: The input files, each {"file", "bytes", "digest"}.
      **settings: Further entries of the manifest (packing, seed); part of the cache's digest.
    """
    vocabulary.save(folder / VOCABULARY_FOLDER)
    manifest = new_manifest(
        KIND,
        **{"packing": None, "seed": None, **settings},
        sequence_length=sequence_length,
        subsets=list(subsets),
        vocabulary=vocabulary.describe(),
        sources=list(sources),
        splits={name: split_info(*written) for name, written in splits.items()},
    )
    write_manifest(folder, manifest)
    return manifest


def _is_shard(name: str) -> bool:
    return name.endswith(".array_record")


def _refuse_contradictions(file: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Refuses inconsistent counts, which would cause obscure errors later."""
    for name in ("sequence_length", "subsets", "splits"):
        if not manifest[name]:
            raise InputError(f"{file}: {name} is {manifest[name]}: {_AGAIN}.")
    for name, info in manifest["splits"].items():
        rows = sum(shard["rows"] for shard in info["shards"])
        if rows != info["rows"] or name not in SPLITS:
            raise InputError(
                f"{file}: the split {name!r} has {info['rows']} rows and its shards {rows}, "
                f"expected the same of {', '.join(SPLITS)}: {_AGAIN}."
            )
