"""Writes a packed cache from given rows."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.data.cache_shards import DocumentCounts, ShardCounts, cache_shard, write_shard
from salt_jax.data.features import Row
from salt_jax.data.packed_cache import begin_cache, finish_cache
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.vocabularies import Vocabulary


def write_rows(
    folder: pathlib.Path,
    rows: Mapping[str, Sequence[Row]],
    *,
    vocabulary: Vocabulary,
    sequence_length: int,
    subsets: Sequence[str] = ("text",),
    shards: int = 1,
    documents: Mapping[str, Mapping[str, DocumentCounts]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Writes the rows of each split into at most `shards` files; returns the manifest."""
    begin_cache(folder)
    form = RecordFormat(sequence_length, vocabulary.size)
    splits: dict[str, tuple[dict[str, ShardCounts], Mapping[str, DocumentCounts]]] = {}
    for split, own in rows.items():
        written = {}
        count = min(shards, len(own))
        bounds = [len(own) * shard // count for shard in range(count + 1)]
        for shard, (start, end) in enumerate(itertools.pairwise(bounds)):
            file = cache_shard(folder, split, shard, count)
            temporary = file.with_name(f"{file.name}.tmp")
            written[f"{split}/{file.name}"] = write_shard(
                file, own[start:end], form, subsets, temporary
            )
        splits[split] = written, (documents or {}).get(split, {})
    return finish_cache(
        folder,
        splits,
        vocabulary=vocabulary,
        sequence_length=sequence_length,
        subsets=subsets,
        **settings,
    )
