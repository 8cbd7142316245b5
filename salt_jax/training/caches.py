"""The packed caches that a run trains on: folders in; orders of rows and a pipeline out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from salt_jax.data.denoisers import Denoising
from salt_jax.data.input_pipeline import InputPipeline, Position
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import MixedOrder, Order, RowOrder, UnusedRows
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.errors import InputError
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.manifests import json_digest

STAGE2_ROWS = ("all", "unused")


@dataclasses.dataclass(frozen=True)
class Caches:
    """One cache, or several to be mixed.

    Attributes:
      packed: The caches by name, the last part of their folders; at least one.
      weights: How much of the rows read are to be of each; only proportions matter.
    """

    packed: dict[str, PackedCache]
    weights: tuple[float, ...]

    @classmethod
    def open(cls, paths: str | Sequence[str], weights: Sequence[float] | None = None) -> "Caches":
        """Opens the caches.

        Args:
          paths: A folder made by `salt prepare`, or several.
          weights: One for each; by default their numbers of rows, for equal epochs.

        Raises:
          InputError: No cache or one twice, two of a name, other vocabularies or lengths, or
            weights that don't fit.
        """
        folders = [local_folder(path) for path in ([paths] if isinstance(paths, str) else paths)]
        names = [folder.absolute().name for folder in folders]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"cache is {', '.join(map(str, folders)) or 'empty'}: name one folder or several "
                "whose last parts differ, which metrics name them by."
            )
        packed = [PackedCache.open(folder) for folder in folders]
        for other in packed[1:]:
            _require_alike(packed[0], other)
        rows = [len(cache.split("train")) for cache in packed]
        if weights is not None and len(packed) == 1:
            raise InputError(
                f"weights is {tuple(weights)} and there is one cache: leave it unset, or "
                "name more with cache."
            )
        return cls(
            dict(zip(names, packed, strict=True)), tuple(rows if weights is None else weights)
        )

    @property
    def first(self) -> PackedCache:
        """The first: vocabulary and sequence length are the same in all."""
        return next(iter(self.packed.values()))

    @property
    def digest(self) -> str:
        """What a run names its rows by: a single cache's digest, or that of digests and weights."""
        if len(self.packed) == 1:
            return self.first.digest
        return json_digest({"caches": [[c["digest"], c["share"]] for c in self.describe()]})

    def describe(self) -> list[dict[str, Any]]:
        """What checkpoints and summary.json hold of them."""
        return [
            {"name": name, "path": str(c.path), "digest": c.digest, "share": w / sum(self.weights)}
            for (name, c), w in zip(self.packed.items(), self.weights, strict=True)
        ]

    def source_of(self, selection: Selection) -> int:
        """Which of the caches a selection was made from.

        Raises:
          InputError: None of them.
        """
        digests = [cache.digest for cache in self.packed.values()]
        if selection.manifest["cache_digest"] not in digests:
            known = ", ".join(
                f"{c.path} ({digest[:12]}…)"
                for c, digest in zip(self.packed.values(), digests, strict=True)
            )
            raise InputError(
                f"The selection in {selection.path} belongs to the cache "
                f"{selection.manifest['cache_digest'][:12]}…, expected {known}: name the cache it "
                "was made from, or select again."
            )
        source = digests.index(selection.manifest["cache_digest"])
        cache = [*self.packed.values()][source]
        selection.require_within(len(cache.split(selection.manifest["split"])))
        return source

    def order(self, seed: int, without: tuple[int, np.ndarray] | None = None) -> Order:
        """All train rows of all caches, interleaved by weight.

        Args:
          seed: Of the shuffles.
          without: A cache's index and ascending row ids to leave out of it.
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
    caches: Caches,
    part: tuple[int, int],
    *,
    batch_size: int,
    seed: int,
    selected: Selection | None,
    stage1_steps: int,
    stage2_rows: str,
    start: Position,
    denoising: Denoising | None,
    soft_labels: StoredLabels | None,
    read_threads: int,
) -> InputPipeline:
    """The batches of this process.

    Args:
      caches: What to read.
      part: What of every batch this process reads (`partitioning.batch_part`).
      batch_size: B, rows of the global batch.
      seed: Of the orders.
      selected: Stage 1's rows, of one of the caches; None reads the caches in both stages.
      stage1_steps: Steps that read stage 1's rows.
      stage2_rows: "all", or "unused": stage 2 reads an order of its own, from its beginning and
        epoch by epoch: all rows but those that stage 1 read of the selection (the first of the
        selected order, as many as stage 1 consumes), shuffled by the same seed, with the other
        caches, if there are any, mixed in as ever. Without a selection both are the same: the
        all-rows order goes on, and comes to no row again before it has been through all.
      start: Where the run stands.
      denoising: What becomes of rows; None is nothing.
      soft_labels: What stands for a teacher in stage 1; of the one cache that there is then.
      read_threads: Threads that read ahead.

    Raises:
      InputError: A selection of another cache, stage2_rows unknown, or no rows left for stage 2.
    """
    if stage2_rows not in STAGE2_ROWS:
        raise InputError(f"stage2_rows is {stage2_rows!r}: choose 'all' or 'unused'.")
    source = caches.source_of(selected) if selected else 0
    pipeline = InputPipeline(
        sources={name: cache.split("train") for name, cache in caches.packed.items()},
        batch_size=batch_size,
        start_id=caches.first.start_id,
        all_rows=caches.order(seed),
        selected_rows=RowOrder(selected.row_ids, 0, seed, source) if selected else None,
        stage1_steps=stage1_steps,
        start=start,
        denoising=denoising,
        soft_labels=soft_labels,
        part=part[0],
        parts=part[1],
        read_threads=read_threads,
    )
    if selected is None or stage2_rows == "all":
        return pipeline
    used = _read_in_stage1(pipeline, selected)
    return dataclasses.replace(pipeline, unused_rows=caches.order(seed, (source, used)))


def _read_in_stage1(pipeline: InputPipeline, selected: Selection) -> np.ndarray:
    """Ascending ids; a selection that stage 1 doesn't exhaust takes 6 s for a million rows read."""
    rows = pipeline.position(max(pipeline.stage1_steps, pipeline.start.step)).stage1_rows
    if rows >= len(selected.row_ids) or pipeline.selected_rows is None:
        return selected.row_ids
    order = pipeline.selected_rows
    ids = np.fromiter((order[at].row_id for at in range(rows)), np.int64, rows)
    ids.sort()
    return ids


def _require_alike(first: PackedCache, other: PackedCache) -> None:
    differ = other.vocabulary_fingerprint != first.vocabulary_fingerprint
    if differ and other.vocabulary != first.vocabulary:
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
