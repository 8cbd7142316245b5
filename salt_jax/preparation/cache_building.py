"""A SeqIO task into a packed cache.

In: a task, its vocabulary, and how to pack. Out: the cache in a folder. Every split is tokenized
and packed before a byte is written, so text that turns out bad leaves nothing behind.

Splits stay apart: a text that stands in several is kept in the test split, else in validation, and
left out of the others.
"""

import pathlib
from collections.abc import Callable

from salt_jax.data.packed_cache import SPLITS, PackedCacheWriter
from salt_jax.data.row_records import LARGEST_SUBSET
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.packing import PackedRows, PackingPlan
from salt_jax.preparation.quiet_tensorflow import seqio
from salt_jax.preparation.text_tasks import TextFilesSource
from salt_jax.preparation.tokenized_documents import read_documents, subset_names

_RECORD_OVERHEAD_BYTES = 256


def build_cache(
    folder: pathlib.Path,
    task: seqio.Task,
    vocabulary: Vocabulary,
    plan: PackingPlan,
    *,
    before_writing: Callable[[int], None] = lambda needed_bytes: None,
) -> None:
    """Reads the task, packs it and writes the cache.

    Args:
      folder: Where the cache will lie.
      task: A SeqIO task with `targets` and perhaps `subset`.
      vocabulary: The vocabulary of its targets.
      plan: How to pack.
      before_writing: Called with the bytes about to be written.

    Raises:
      InputError: What reading raises (tokenized_documents.py); or too many subsets.
    """
    subsets = subset_names(task)
    if len(subsets) > LARGEST_SUBSET + 1:
        raise InputError(
            f"The text has {len(subsets):,} subset names, a cache holds {LARGEST_SUBSET + 1:,}: "
            "leave `subset` out of the rows, or give fewer names."
        )
    packed: dict[str, PackedRows] = {}
    counts: dict[str, dict[str, int]] = {}
    texts: set[bytes] = set()
    for split in [name for name in reversed(SPLITS) if name in task.splits]:
        documents = read_documents(task, split, vocabulary, texts)
        packed[split] = PackedRows(
            documents.tokens,
            documents.subsets,
            packing=plan.packing,
            sequence_length=plan.sequence_length,
            pad_id=vocabulary.pad_id,
            seed=plan.seed,
            split=split,
        )
        counts[split] = {
            "documents": len(documents.tokens),
            "text_bytes": documents.text_bytes,
            "shared_documents": documents.shared,
        }
        texts |= documents.text_digests
    source = task.source if isinstance(task.source, TextFilesSource) else None
    row_bytes = 4 * plan.sequence_length + _RECORD_OVERHEAD_BYTES
    before_writing(row_bytes * sum(map(len, packed.values())))
    writer = PackedCacheWriter(
        folder,
        vocabulary=vocabulary,
        sequence_length=plan.sequence_length,
        subsets=subsets,
        shards=plan.shards,
        settings={"packing": plan.packing, "seed": plan.seed},
        sources=source.files.sources(source.broken_lines) if source else (),
    )
    for split, rows in packed.items():
        writer.write_split(split, rows, num_rows=len(rows), **counts[split])
    writer.finish()
