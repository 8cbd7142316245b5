"""A pass of a frozen model over the rows of a split in shards, by one of several workers."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.data import input_pipeline
from salt_jax.data.features import Batch, Row
from salt_jax.data.packed_cache import PackedCache, PackedSplit
from salt_jax.distill import losses
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import in_order, partitioning


@dataclasses.dataclass(frozen=True)
class ModelPass:
    """The model, rows and devices of a pass.

    Attributes:
      config: The model.
      cache: The rows.
      split: The split of the cache.
      batch_size: Rows at once, rounded up to a multiple of what the mesh splits a batch into.
      mesh: Devices of this process alone.
      rules: Logical-axis rules.
      chunk_tokens: Tokens whose logits a device holds at once.
      worker: This worker's number, from 0.
      workers: Workers that share the pass.
      progress: Called with the number of rows after each batch.
    """

    config: DecoderConfig
    cache: PackedCache
    split: str
    batch_size: int
    mesh: Mesh
    rules: partitioning.Rules = partitioning.DEFAULT_RULES
    chunk_tokens: int = losses.LossConfig.chunk_tokens
    worker: int = 0
    workers: int = 1
    progress: Callable[[int], None] = lambda rows: None

    def results(
        self, program: Callable[..., Any], params: Any, shards: Sequence[Sequence[int]]
    ) -> Iterator[Iterator[tuple[Batch, Any]]]:
        """Runs a function (params, batch) → arrays over shards, each given by its rows' ids.

        Each shard has its own batches, so that its contents don't depend on where a pass was
        interrupted or on the number of workers.

        Yields:
          For each shard its batches and their results, to be read before the next shard's.
        """
        split, start_id = self.cache.split(self.split), self.cache.start_id
        size = in_order.rounded_up(self.batch_size, self.mesh)
        batches = (
            batch
            for rows in shards
            for batch in input_pipeline.in_order(_RowsOf(split, rows), size, start_id)
        )
        results = in_order.over_batches(jax.jit(program), params, batches, self.mesh, self.rules)
        for rows in shards:
            yield itertools.islice(results, -(-len(rows) // size))


@dataclasses.dataclass(frozen=True)
class _RowsOf:
    """The rows of a split with the given ids, as a data source."""

    split: PackedSplit
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return self.split.__getitems__([self.rows[index] for index in indices])


def own_mesh(config: partitioning.MeshConfig) -> Mesh:
    """The mesh of this process's own devices, since workers score shards independently.

    With several processes `config` describes the devices of all: its tensor axis is kept, and all
    other devices of this process are along fsdp.
    """
    if jax.process_count() > 1:
        config = partitioning.MeshConfig(tensor=config.tensor)
    return config.make(jax.local_devices())
