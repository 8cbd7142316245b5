"""Stored soft labels: a teacher's word on the rows of a split, so that runs share one pass of it.

In: labels shard by shard, of all rows of a split or of the rows of a selection. Out: a folder of
shards/ (label_format.py's records one after another), manifest.json and COMPLETED; and labels again
by row id, from any place, without a model in memory. A folder names its cache, its teacher and its
temperature: labels of another cache are refused here, another temperature by what trains.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.data.label_format import LabelFormat, Labels
from salt_jax.data.row_ids import ROW_IDS_FILE, read_row_ids, write_row_ids
from salt_jax.errors import InputError
from salt_jax.storage import durable_files
from salt_jax.storage.json_files import read_json_object, require_shape
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.manifests import (
    COST,
    FORMAT_VERSIONS,
    MANIFEST_FILE,
    file_digest,
    json_digest,
    read_manifest,
)
from salt_jax.storage.restartable_shards import FinishedShards, RestartableShards, Shard

SUFFIX = ".labels"
COST_FILE = "cost.json"
MADE_BY = "salt score --soft_labels"
_AGAIN = f"copy the folder again, or run its `{MADE_BY}` again"


class SoftLabelsWriter:
    """Soft labels in the making, by one worker of perhaps several.

    Args:
      folder: Where they will lie; a folder that holds the same labels begun is gone on with.
      cache_digest: PackedCache.digest of the cache.
      split: The split.
      rows: Rows of the split.
      row_ids: int64[m], ascending: the rows to label; None is all of them.
      selection_digest: Selection.digest, where row_ids are a selection's.
      teacher: The model: path, step, digest.
      temperature: τ.
      form: The records.
      shard_rows: Rows of a shard.

    Raises:
      InputError: The folder was begun with something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        cache_digest: str,
        split: str,
        rows: int,
        row_ids: np.ndarray | None,
        selection_digest: str | None,
        teacher: Mapping[str, Any],
        temperature: float,
        form: LabelFormat,
        shard_rows: int,
    ) -> None:
        self._row_ids, self._form = row_ids, form
        made_from = {
            "cache": cache_digest,
            "split": split,
            "selection": selection_digest,
            "scorer": dict(teacher),
            "soft_label_temperature": temperature,
            "format": dataclasses.asdict(form),
            "format_version": FORMAT_VERSIONS["soft_labels"],
        }
        self.shards = RestartableShards.of(
            folder,
            rows=rows if row_ids is None else len(row_ids),
            shard_rows=shard_rows,
            suffix=SUFFIX,
            made_from=made_from,
        )

    def begin(self) -> None:
        """Makes the folder, if need be.

        Raises:
          InputError: Another pass was begun here in the meantime.
        """
        self.shards = self.shards.begin()
        if self._row_ids is not None:
            write_row_ids(self.shards.folder / ROW_IDS_FILE, [self._row_ids])

    def row_ids(self, shard: Shard) -> Sequence[int]:
        """The rows of the split that a shard is of."""
        if self._row_ids is None:
            return shard.rows
        return self._row_ids[shard.rows.start : shard.rows.stop].tolist()

    def write(self, shard: Shard, batches: Iterable[Labels], workers: int = 1) -> None:
        """Writes a shard as its labels are made, and measures how long that takes.

        Args:
          shard: Which.
          batches: The labels of its rows, in order.
          workers: Among how many the pass is divided.

        Raises:
          InputError: A label is not finite: the teacher is broken.
        """
        start, row_ids, written = time.perf_counter(), self.row_ids(shard), 0
        with self.shards.write(shard) as file:
            for labels in batches:
                if (broken_n := labels.are_broken()).any():
                    raise InputError(
                        f"The teacher {self.shards.made_from['scorer']['path']} gives numbers that "
                        f"are not finite for row {row_ids[written + int(broken_n.argmax())]} of "
                        f"{self.shards.made_from['split']}: name another --scorer_step."
                    )
                file.write(self._form.encode(labels).tobytes())
                written += len(broken_n)
            file.finish({}, {"seconds": time.perf_counter() - start, "workers": workers})

    def complete(self, cost: Mapping[str, Any]) -> "StoredLabels":
        """Completes the folder, every shard of which is finished, and opens it.

        Args:
          cost: The pass's FLOPs and tokens; its seconds are those that the shards took.
        """
        shards = self.shards
        if not shards.completed:
            seconds = sum(one["seconds"] / one["workers"] for one in shards.measured())
            text = json.dumps({**cost, "seconds": seconds}) + "\n"
            durable_files.write_text(shards.folder / COST_FILE, text)
            made_from, ids = shards.made_from, shards.folder / ROW_IDS_FILE
            shards.complete(
                "soft_labels",
                cache_digest=made_from["cache"],
                split=made_from["split"],
                selection_digest=made_from["selection"],
                row_ids_digest=None if self._row_ids is None else file_digest(ids),
                teacher=made_from["scorer"],
                temperature=made_from["soft_label_temperature"],
                format=made_from["format"],
            )
        return StoredLabels.open(shards.folder)


@dataclasses.dataclass(frozen=True)
class StoredLabels:
    """A finished folder of soft labels; make one with `StoredLabels.open`.

    Attributes:
      path: The folder.
      manifest: cache_digest, split, selection_digest (None: of all rows), teacher {path, step,
        digest}, temperature, format, rows, shard_rows, shards.
      digest: The manifest's, which holds the digests of the shards.
    """

    path: pathlib.Path
    manifest: Mapping[str, Any]
    digest: str

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, cache_digest: str | None = None
    ) -> "StoredLabels":
        """Opens a folder. Sizes are compared; what a row holds is checked whenever it is read.

        Args:
          folder: A folder written by `salt score --soft_labels=K`.
          cache_digest: The cache they must belong to; None takes any.

        Raises:
          InputError: Not there, half-written, a shard missing or cut short, or of another cache.
        """
        path = local_folder(folder)
        manifest = read_manifest(path, "soft_labels")
        if cache_digest is not None and manifest["cache_digest"] != cache_digest:
            raise InputError(
                f"The soft labels in {path} belong to the cache {manifest['cache_digest'][:12]}…, "
                f"expected the cache {cache_digest[:12]}…: name the cache they were made from, or "
                "make them again from this one."
            )
        labels = cls(path, manifest, json_digest(manifest))
        labels._require_sizes()
        _ = labels._shards, labels._row_ids  # which look at every file
        return labels

    @property
    def format(self) -> LabelFormat:
        """The records."""
        fields = dataclasses.fields(LabelFormat)
        return LabelFormat(**{field.name: self.manifest["format"][field.name] for field in fields})

    @property
    def rows(self) -> int:
        """Rows that have labels."""
        return self.manifest["rows"]

    @property
    def cost(self) -> dict[str, Any]:
        """What the teacher's pass took: flops, tokens, seconds."""
        path = self.path / COST_FILE
        cost = read_json_object(path, _AGAIN)
        require_shape(path, cost, COST, _AGAIN)
        return cost

    def read(self, row_ids: Sequence[int] | np.ndarray) -> Labels:
        """The labels of some rows of the split, in that order.

        Raises:
          InputError: A row has none, its bytes have changed, or they hold a number that is not
            finite.
        """
        at_N = ids_N = np.asarray(row_ids, np.int64)
        have_N = ids_N < self.rows
        if self._row_ids is not None:
            at_N = np.minimum(np.searchsorted(self._row_ids, ids_N), self.rows - 1)
            have_N = self._row_ids[at_N] == ids_N
        if not have_N.all():
            raise InputError(
                f"Row {ids_N[~have_N][0]} has no soft labels in {self.path}: make labels of all "
                "rows, or of the selection that is trained on."
            )
        records = np.empty((len(ids_N), self.format.record_bytes), np.uint8)
        shard_N = at_N // self.manifest["shard_rows"]
        for shard in np.unique(shard_N):
            here_N = shard_N == shard
            own = self._map(int(shard))[at_N[here_N] % self.manifest["shard_rows"]]
            if (damaged_n := self.format.damaged(own)).any():
                row = ids_N[here_N][damaged_n][0]
                raise self._shards.damage(int(shard), f"is damaged at row {row} (its check sum)")
            records[here_N] = own
        labels = self.format.decode(records)
        if (broken_n := labels.are_broken()).any():
            raise InputError(
                f"The soft labels {self.path} have a number that is not finite for row "
                f"{ids_N[broken_n][0]}: {_AGAIN}."
            )
        return labels

    def require_fit(self, *, temperature: float, k: int, selection_digest: str | None) -> None:
        """Refuses labels that a stage 1 cannot be trained on.

        Args:
          temperature: LossConfig.teacher_temperature.
          k: LossConfig.teacher_top_k.
          selection_digest: Of the selection whose rows it reads; None for all rows.

        Raises:
          InputError: They are of another split, temperature or selection, or have too few ids.
        """
        manifest = self.manifest
        if manifest["split"] != "train":
            raise InputError(
                f"The soft labels {self.path} are of the {manifest['split']} split, not train."
            )
        if manifest["temperature"] != temperature:
            raise InputError(
                f"The soft labels {self.path} were made at the temperature "
                f"{manifest['temperature']} and LossConfig.teacher_temperature is {temperature}: "
                "set it to the labels'."
            )
        if k > self.format.k:
            raise InputError(
                f"LossConfig.teacher_top_k is {k} and the soft labels {self.path} have "
                f"{self.format.k} ids a token: lower it, or set it to 0 for all of them."
            )
        of_selection = manifest["selection_digest"]
        if of_selection not in (None, selection_digest):
            raise InputError(
                f"The soft labels {self.path} are of the rows of the selection "
                f"{of_selection[:12]}…, and stage 1 reads "
                f"{'another one' if selection_digest else 'all rows'}: set that selection, or "
                "label all rows."
            )

    def _require_sizes(self) -> None:
        """Refuses records that shards of these sizes don't hold."""
        form, file = self.format, self.path / MANIFEST_FILE
        if not form.sequence_length:
            raise InputError(f"{file}: sequence_length is 0: {_AGAIN}.")
        for shard in self.manifest["shards"]:
            if shard["bytes"] != shard["rows"] * form.record_bytes:
                raise InputError(
                    f"{file}: a shard of {shard['rows']} rows has {shard['bytes']} bytes, "
                    f"expected {form.record_bytes} a row: {_AGAIN}."
                )

    @functools.cached_property
    def _shards(self) -> FinishedShards:
        return FinishedShards(self.path, self.manifest, SUFFIX, MADE_BY)

    @functools.cached_property
    def _row_ids(self) -> np.ndarray | None:
        if self.manifest["row_ids_digest"] is None:
            return None
        return read_row_ids(self.path, self.rows, self.manifest["row_ids_digest"], MADE_BY)

    def _map(self, shard: int) -> np.ndarray:
        shape = self._shards.rows_of(shard), self.format.record_bytes
        return np.memmap(self._shards.path(shard, verify=False), np.uint8, "r", shape=shape)
