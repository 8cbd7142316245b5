"""Stored soft labels: a teacher's output on the rows of a split, computed once for many runs.

A folder of records (`label_format`) for all rows of a split or for those of a selection, read by
row id in any order without a teacher in memory. The manifest names the teacher and the temperature,
which training compares with its own.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.data.label_format import LabelFormat, Labels
from salt_jax.data.row_ids import ROW_IDS_FILE, read_row_ids, write_row_ids
from salt_jax.data.row_passes import RowPass
from salt_jax.data.shard_columns import Column
from salt_jax.errors import InputError
from salt_jax.storage.manifests import FORMAT_VERSIONS, file_digest
from salt_jax.storage.restartable_shards import COST_FILE, RestartableShards, Shard


class SoftLabelsWriter(RestartableShards):
    """Writes soft labels of a split of `rows` rows; InputError if another pass was begun in the
    folder.

    Args:
      row_ids: int64[m], ascending: the rows to label; None means all.
      selection_digest: Selection.digest if row_ids are a selection's.
      teacher: The model: path, step, digest.
      temperature: τ.
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
            "format_version": FORMAT_VERSIONS[StoredLabels.kind],
        }
        super().__init__(
            folder,
            rows=rows if row_ids is None else len(row_ids),
            shard_rows=shard_rows,
            suffix=StoredLabels.suffix,
            made_from=made_from,
        )

    def begin(self) -> None:
        super().begin()
        if self._row_ids is not None:
            write_row_ids(self.folder / ROW_IDS_FILE, [self._row_ids])

    def row_ids(self, shard: Shard) -> Sequence[int]:
        """The ids of a shard's rows."""
        if self._row_ids is None:
            return shard.rows
        return self._row_ids[shard.rows.start : shard.rows.stop].tolist()

    def write(self, shard: Shard, batches: Iterable[Labels], workers: int = 1) -> None:
        """Writes a shard from batches of labels of its rows, in order, and records the time taken
        and the number of workers; InputError for non-finite labels."""
        start, row_ids, written = time.perf_counter(), self.row_ids(shard), 0
        with self.writing(shard) as file:
            for labels in batches:
                if (broken_n := labels.are_broken()).any():
                    raise InputError(
                        f"The teacher {self.made_from['scorer']['path']} gives values that "
                        f"are not finite for row {row_ids[written + int(np.argmax(broken_n))]} of "
                        f"{self.made_from['split']}: name another --scorer_step."
                    )
                file.write(self._form.encode(labels).tobytes())
                written += len(broken_n)
            file.finish({}, {"seconds": time.perf_counter() - start, "workers": workers})

    def complete(self, cost: Mapping[str, Any]) -> "StoredLabels":
        """Completes the folder once every shard is finished, and opens it; see `finish`."""
        if not self.completed:
            made_from, ids = self.made_from, self.folder / ROW_IDS_FILE
            self.finish(
                StoredLabels.kind,
                cost,
                cache_digest=made_from["cache"],
                split=made_from["split"],
                selection_digest=made_from["selection"],
                row_ids_digest=None if self._row_ids is None else file_digest(ids),
                teacher=made_from["scorer"],
                temperature=made_from["soft_label_temperature"],
                format=made_from["format"],
            )
        return StoredLabels.open(self.folder)


class StoredLabels(RowPass):
    """A finished folder of soft labels; each row is checked when read.

    The manifest adds selection_digest (None: all rows), row_ids_digest, teacher {path, step,
    digest}, temperature and format.
    """

    kind, called, suffix = "soft_labels", "soft labels", ".labels"
    made_by = "salt score --soft_labels"

    def checked_row_bytes(self) -> int:
        if not self.format.sequence_length:
            raise self.contradiction("sequence_length is 0")
        _ = self._row_ids  # which reads the file
        try:
            return self.format.record_bytes
        except ValueError as error:
            raise self.contradiction(f"its records are too large ({error})") from error

    @property
    def cost(self) -> dict[str, Any]:
        """The cost of the teacher's pass: flops, tokens, seconds."""
        if (cost := super().cost) is None:
            raise InputError(f"{self.path} has lost its {COST_FILE}: {self.again}.")
        return cost

    @property
    def format(self) -> LabelFormat:
        """The record format."""
        fields = dataclasses.fields(LabelFormat)
        return LabelFormat(**{field.name: self.manifest["format"][field.name] for field in fields})

    def read(self, row_ids: Sequence[int] | np.ndarray) -> Labels:
        """The labels of some rows of the split, in that order; InputError if a row's are missing or
        damaged."""
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
        dtype = np.dtype([("record", f"V{self.format.record_bytes}")])
        column = Column(self.shards, dtype, "record", verify=False)
        records = column[at_N].view(np.uint8).reshape(len(at_N), self.format.record_bytes)
        if (damaged_N := self.format.damaged(records)).any():
            shard = int(at_N[damaged_N][0]) // self.shards.shard_rows
            row = ids_N[damaged_N][0]
            raise self.shards.damage(shard, f"is damaged at row {row} (wrong checksum)")
        labels = self.format.decode(records)
        if (broken_N := labels.are_broken()).any():
            raise InputError(
                f"The soft labels {self.path} have a value that is not finite for row "
                f"{ids_N[broken_N][0]}: {self.again}."
            )
        return labels

    def require_fit(self, *, temperature: float, k: int, selection_digest: str | None) -> None:
        """Refuses labels whose split, temperature (LossConfig.teacher_temperature), number of ids
        (teacher_top_k) or selection (None for all rows) don't fit stage 1."""
        manifest = self.manifest
        if manifest["split"] != "train":
            raise InputError(
                f"The soft labels {self.path} are of the {manifest['split']} split, not train."
            )
        if manifest["temperature"] != temperature:
            raise InputError(
                f"The soft labels {self.path} were made at temperature "
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

    @functools.cached_property
    def _row_ids(self) -> np.ndarray | None:
        digest = self.manifest["row_ids_digest"]
        if digest is None:
            return None
        return read_row_ids(self.path, self.rows, digest, self.made_by)
