"""The packed caches that a run trains on, and the input pipeline over them."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from salt_jax.data.denoisers import Denoising
from salt_jax.data.input_pipeline import InputPipeline, Position
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import MixedOrder, Order, RowOrder, UnusedRows
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.errors import InputError
from salt_jax.storage.manifests import json_digest
from salt_jax.training import partitioning
from salt_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Caches:
    """One cache, or a mixture of several.

    Attributes:
      packed: The caches by name, which is the last part of their folders; at least one.
      weights: Each cache's share of the rows read; only proportions matter.
    """

    packed: dict[str, PackedCache]
    weights: tuple[float, ...]

    @classmethod
    def open(cls, paths: str | Sequence[str], weights: Sequence[float] | None = None) -> "Caches":
        """Opens one folder made by `salt prepare`, or several; weights are by default their rows.

        Raises:
          InputError: No cache or one twice, two of a name, different vocabularies or lengths, or
            weights for a single cache.
        """
        folders = [paths] if isinstance(paths, str) else list(paths)
        names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"cache is {', '.join(folders) or 'empty'}: name one folder or several whose last "
                "parts differ, which metrics name them by."
            )
        packed = [PackedCache.open(folder) for folder in folders]
        for other in packed[1:]:
            _require_alike(packed[0], other)
        rows = [len(cache.split("train")) for cache in packed]
        if weights is not None and len(packed) == 1:
            raise InputError(
                f"weights is {tuple(weights)} and there is one cache: leave it unset, or "
                "name more caches with cache."
            )
        return cls(
            dict(zip(names, packed, strict=True)), tuple(rows if weights is None else weights)
        )

    @property
    def first(self) -> PackedCache:
        """The first cache; all have its vocabulary and sequence length."""
        return next(iter(self.packed.values()))

    @property
    def digest(self) -> str:
        """Identifies the rows of a run: a cache's digest, or one of all digests and weights."""
        if len(self.packed) == 1:
            return self.first.digest
        return json_digest({"caches": [[c["digest"], c["share"]] for c in self.describe()]})

    def describe(self) -> list[dict[str, Any]]:
        """The caches as checkpoints and summary.json record them."""
        return [
            {"name": name, "path": c.folder.url, "digest": c.digest, "share": w / sum(self.weights)}
            for (name, c), w in zip(self.packed.items(), self.weights, strict=True)
        ]

    def source_of(self, selection: Selection) -> int:
        """The index of the cache that a selection was made from; InputError if none of these."""
        caches = list(self.packed.values())
        digest = selection.manifest["cache_digest"]
        for source, cache in enumerate(caches):
            if cache.digest == digest:
                selection.require_within(len(cache.split(selection.manifest["split"])))
                return source
        known = ", ".join(f"{cache.path} ({cache.digest[:12]}…)" for cache in caches)
        raise InputError(
            f"The selection in {selection.path} belongs to the cache {digest[:12]}…, expected "
            f"{known}: name the cache it was made from, or select again."
        )

    def order(self, seed: int, without: tuple[int, np.ndarray] | None = None) -> Order:
        """The train rows of all caches, shuffled by `seed` and interleaved by weight.

        `without` is the index of a cache and ascending row ids to leave out of it.
        """
        orders = []
        for source, cache in enumerate(self.packed.values()):
            rows = len(cache.split("train"))
            kept = None
            if without is not None and without[0] == source:
                kept = UnusedRows(rows, without[1])
                if not len(kept):
                    raise InputError(
                        f"stage2_rows is 'unused' and stage 1 reads all {rows:,} rows of "
                        f"{cache.path}: select fewer, or set stage2_rows to 'all'."
                    )
            orders.append(RowOrder(kept, rows, seed, source))
        return orders[0] if len(orders) == 1 else MixedOrder(orders, self.weights)


def make_pipeline(
    config: TrainConfig,
    caches: Caches,
    mesh: Mesh,
    selected: Selection | None,
    start: Position,
    denoising: Denoising | None,
    soft_labels: StoredLabels | None,
) -> InputPipeline:
    """The batches of this process.

    With stage2_rows "unused", stage 2 reads its own order from the beginning, shuffled by the same
    seed and mixed with the other caches: all rows except those of the selection that stage 1 reads.
    Without a selection nothing changes: the order of all rows repeats none before it has read all.

    Args:
      config: Batch size, seed, stages and read threads.
      caches: What to read.
      mesh: This process reads the part of each batch that its devices of the mesh hold.
      selected: Stage 1's rows, of one of the caches; None reads all rows in both stages.
      start: The position to start from.
      denoising: How rows are denoised; None leaves them unchanged.
      soft_labels: Soft labels of the one cache, used in stage 1 instead of a teacher.

    Raises:
      InputError: A selection of another cache, or no rows left for stage 2.
    """
    data = config.data
    source = caches.source_of(selected) if selected else 0
    part, parts = partitioning.batch_part(mesh)
    pipeline = InputPipeline(
        sources={name: cache.split("train") for name, cache in caches.packed.items()},
        batch_size=data.batch_size,
        start_id=caches.first.start_id,
        all_rows=caches.order(data.seed),
        selected_rows=RowOrder(selected.row_ids, 0, data.seed, source) if selected else None,
        stage1_steps=min(data.selection_steps or config.stage1_steps, config.steps),
        start=start,
        denoising=denoising,
        soft_labels=soft_labels,
        part=part,
        parts=parts,
        read_threads=data.read_threads,
    )
    if selected is None or data.stage2_rows == "all":
        return pipeline
    used = _read_in_stage1(pipeline, selected)
    return dataclasses.replace(pipeline, unused_rows=caches.order(data.seed, (source, used)))


def _read_in_stage1(pipeline: InputPipeline, selected: Selection) -> np.ndarray:
    """Ascending ids of the selected rows that stage 1 reads; takes 6 s for a million of them."""
    rows = pipeline.position(max(pipeline.stage1_steps, pipeline.start.step)).stage1_rows
    order = pipeline.selected_rows
    if order is None or rows >= len(selected.row_ids):
        return selected.row_ids
    return np.sort(np.fromiter((order[at].row_id for at in range(rows)), np.int64, rows))


def _require_alike(first: PackedCache, other: PackedCache) -> None:
    if other.vocabulary_fingerprint != first.vocabulary_fingerprint and (
        other.vocabulary != first.vocabulary
    ):
        raise InputError(
            f"The cache {other.path} has the vocabulary {other.vocabulary_fingerprint[:12]} and "
            f"{first.path} has {first.vocabulary_fingerprint[:12]}: mix caches prepared with the "
            "same vocabulary."
        )
    if other.sequence_length != first.sequence_length:
        raise InputError(
            f"The cache {other.path} has rows of {other.sequence_length} tokens and {first.path} "
            f"of {first.sequence_length}: mix caches prepared with the same sequence_length."
        )
