"""A SeqIO task into a packed cache.

In: a task, its vocabulary, and how to pack. Out: the cache in a folder, and what the reading came
across. Every split is tokenized and packed before a byte is written, so text that turns out bad
leaves no cache behind.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import seqio

from salt_jax.data.packed_cache import SPLITS, PackedCacheWriter
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.packing import PACKINGS, PackedRows
from salt_jax.preparation.text_tasks import TextFilesSource
from salt_jax.preparation.tokenized_documents import read_documents, subset_names

_RECORD_OVERHEAD_BYTES = 256


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """How documents become rows.

    Attributes:
      sequence_length: L, tokens a row.
      packing: "concatenate_and_split" or "whole_documents" (packing.py).
      shards: Files a split is cut into.
      seed: Of the order of documents and rows.
    """

    sequence_length: int = 128
    packing: str = "concatenate_and_split"
    shards: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise InputError(f"packing is {self.packing!r}, expected one of {', '.join(PACKINGS)}.")
        if self.sequence_length < 2:
            raise InputError(
                f"sequence_length is {self.sequence_length}, expected 2 tokens or more."
            )
        if self.shards < 1:
            raise InputError(f"shards is {self.shards}, expected 1 or more.")


@dataclasses.dataclass(frozen=True)
class BuiltCache:
    """What was built.

    Attributes:
      manifest: The cache's.
      broken_lines: Lines passed over, by file.
      shared_texts: Distinct texts of each held-out split that the train split has too.
    """

    manifest: Mapping[str, Any]
    broken_lines: Mapping[str, int]
    shared_texts: Mapping[str, int]


def build_cache(
    folder: pathlib.Path,
    task: seqio.Task,
    vocabulary: Vocabulary,
    plan: PackingPlan,
    *,
    before_writing: Callable[[int], None] = lambda needed_bytes: None,
) -> BuiltCache:
    """Reads the task, packs it and writes the cache.

    Args:
      folder: Where the cache will lie.
      task: A SeqIO task with `targets` and perhaps `subset`.
      vocabulary: The vocabulary of its targets.
      plan: How to pack.
      before_writing: Called with the bytes about to be written.

    Raises:
      InputError: What reading raises (tokenized_documents.py).
    """
    subsets = subset_names(task)
    packed: dict[str, PackedRows] = {}
    counts: dict[str, dict[str, int]] = {}
    texts = {}
    for split in [name for name in SPLITS if name in task.splits]:
        documents = read_documents(task, split, vocabulary)
        packed[split] = PackedRows(
            documents.tokens,
            documents.subsets,
            packing=plan.packing,
            sequence_length=plan.sequence_length,
            pad_id=vocabulary.pad_id,
            seed=plan.seed,
            split=split,
        )
        counts[split] = {"documents": len(documents.tokens), "text_bytes": documents.text_bytes}
        texts[split] = documents.text_digests
    row_bytes = 4 * plan.sequence_length + _RECORD_OVERHEAD_BYTES
    before_writing(row_bytes * sum(map(len, packed.values())))
    files = task.source.files if isinstance(task.source, TextFilesSource) else None
    writer = PackedCacheWriter(
        folder,
        vocabulary=vocabulary,
        sequence_length=plan.sequence_length,
        subsets=subsets,
        shards=plan.shards,
        settings={"packing": plan.packing, "seed": plan.seed},
        sources=files.sources() if files else (),
    )
    for split, rows in packed.items():
        writer.write_split(split, rows, num_rows=len(rows), **counts[split])
    return BuiltCache(
        manifest=writer.finish(),
        broken_lines=dict(task.source.broken_lines) if files else {},
        shared_texts={
            split: len(texts[split] & texts["train"])
            for split in texts
            if split != "train" and "train" in texts
        },
    )
