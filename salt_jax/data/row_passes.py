"""Folders of per-row results of a model's pass over a split: `RowScores` and `StoredLabels`.

Shards are written first and kept if the pass is killed, then manifest.json and COMPLETED. The
manifest names the cache by its digest.
"""

import abc
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from salt_jax.errors import InputError
from salt_jax.storage.block_copies import InputFolder
from salt_jax.storage.json_files import read_json_object, require_shape
from salt_jax.storage.manifests import COST, MANIFEST_FILE, json_digest, read_manifest
from salt_jax.storage.restartable_shards import COST_FILE, SHARDS_FOLDER, FinishedShards


@dataclasses.dataclass(frozen=True)
class RowPass(abc.ABC):
    """A finished pass; make one with `open`.

    Attributes:
      folder: The folder.
      manifest: cache_digest, split, rows, shard_rows, shards, and the kind's own entries.
      digest: The manifest's digest.
    """

    kind: ClassVar[str]
    called: ClassVar[str]
    suffix: ClassVar[str]
    made_by: ClassVar[str]

    folder: InputFolder
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None) -> Self:
        """Opens a finished folder: checks sizes now, contents when they are read.

        Args:
          folder: The folder.
          cache_digest: The cache it must belong to; None accepts any.

        Raises:
          InputError: It is missing, half-written or of another cache, or a shard is missing or
            truncated.
        """
        opened_folder = InputFolder(folder, _is_shard)
        path = opened_folder.path
        manifest = read_manifest(path, cls.kind)
        refuse_other_cache(path, cls.called, manifest, cache_digest)
        opened = cls(opened_folder, manifest, json_digest(manifest))
        row_bytes = opened.checked_row_bytes()
        for shard in manifest["shards"]:
            if shard["bytes"] < shard["rows"] * row_bytes:  # an .npy file has a header too
                raise opened.contradiction(
                    f"a shard of {shard['rows']} rows has {shard['bytes']} bytes, expected "
                    f"{row_bytes} a row"
                )
        _ = opened.shards  # checks every file
        return opened

    @abc.abstractmethod
    def checked_row_bytes(self) -> int:
        """Bytes per row in a shard, after checking the kind's own entries and files."""

    @property
    def path(self) -> pathlib.Path:
        """The folder on disk or, for one in a bucket, that of the copies of its small files."""
        return self.folder.path

    @property
    def rows(self) -> int:
        """Rows that the pass covers."""
        return self.manifest["rows"]

    @property
    def cost(self) -> dict[str, Any] | None:
        """The pass's cost: flops, tokens, seconds; None if unknown."""
        path = self.path / COST_FILE
        if not path.exists():
            return None
        cost = read_json_object(path, self.again)
        require_shape(path, cost, COST, self.again)
        return cost

    @functools.cached_property
    def shards(self) -> FinishedShards:
        """The shards' files."""
        return FinishedShards(self.folder, self.manifest, self.suffix, self.made_by)

    @property
    def again(self) -> str:
        """The remedy for a damaged folder, for messages."""
        return f"copy the folder again, or run its `{self.made_by}` again"

    def contradiction(self, what: str) -> InputError:
        """The error for an inconsistent manifest."""
        return InputError(f"{self.path / MANIFEST_FILE}: {what}: {self.again}.")


def _is_shard(name: str) -> bool:
    return name.startswith(f"{SHARDS_FOLDER}/")


def refuse_other_cache(
    path: pathlib.Path, called: str, manifest: Mapping[str, Any], cache_digest: str | None
) -> None:
    """Refuses a folder that belongs to a cache with another digest; None accepts any."""
    if cache_digest is not None and manifest["cache_digest"] != cache_digest:
        raise InputError(
            f"The {called} in {path} belong to the cache {manifest['cache_digest'][:12]}…, "
            f"expected the cache {cache_digest[:12]}…: name the cache they were made from, "
            "or make them again from this one."
        )
