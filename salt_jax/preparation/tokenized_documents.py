"""A split of a SeqIO task, read to its end.

In: a task and a split. Out: every document's ids, subset and bytes of text, in the task's
unshuffled order. Memory holds the ids (two bytes each for vocabularies up to 65,536), not the text.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Set

import numpy as np

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.quiet_tensorflow import seqio, tf
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.seqio_adapters import SubsetVocabulary


@dataclasses.dataclass(frozen=True)
class TokenizedDocuments:
    """One split's documents.

    Attributes:
      tokens: Ids of each document, its end included.
      subsets: int64[D], index of each document's subset.
      text_bytes: UTF-8 bytes of all the text.
      text_digests: 16 bytes for each distinct text.
      shared: Documents left out because another split has their text.
    """

    tokens: list[np.ndarray]
    subsets: np.ndarray
    text_bytes: int
    text_digests: frozenset[bytes]
    shared: int = 0


def find_task(task: RegisteredTask) -> seqio.Task:
    """The task of that name in SeqIO's registry.

    Raises:
      InputError: The module cannot be found, or no such task is registered.
    """
    if task.module:
        try:
            importlib.import_module(task.module)
        except ModuleNotFoundError as error:
            raise InputError(
                f"The module {task.module} of RegisteredTask.module cannot be imported ({error}): "
                "correct the name, or put its folder on PYTHONPATH."
            ) from error
    if task.name not in seqio.TaskRegistry.names():
        names = ", ".join(sorted(seqio.TaskRegistry.names())) or "none"
        raise InputError(
            f"SeqIO knows no task {task.name!r}, it knows {names}: correct RegisteredTask.name, or "
            "set RegisteredTask.module to the module that registers it."
        )
    return seqio.TaskRegistry.get(task.name)


def subset_names(task: seqio.Task) -> tuple[str, ...]:
    """The names that the task's `subset` indexes; the task's own name where it has none."""
    feature = task.output_features.get("subset")
    if feature is None:
        return (task.name,)
    if isinstance(feature.vocabulary, SubsetVocabulary):
        return feature.vocabulary.names
    return tuple(f"subset {index}" for index in range(feature.vocabulary.vocab_size))


def read_documents(
    task: seqio.Task, split: str, vocabulary: Vocabulary, other_splits: Set[bytes] = frozenset()
) -> TokenizedDocuments:
    """Tokenizes a split. Documents without any token are left out.

    Args:
      task: The task.
      split: One of its splits.
      vocabulary: The vocabulary of its targets.
      other_splits: Digests of texts to leave out, because other splits have them.

    Raises:
      InputError: What the files' readers raise; or a split without documents.
    """
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    tokens, subsets, digests, text_bytes, shared = [], [], set(), 0, 0
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, try_in_mem_cache=False
    )
    try:
        for example in dataset.as_numpy_iterator():
            ids = example["targets"]
            if "targets_pretokenized" in example:
                text = example["targets_pretokenized"]
            else:
                text = vocabulary.decode(ids.tolist()).encode()
            digest = hashlib.blake2b(text, digest_size=16).digest()
            if digest in other_splits:
                shared += 1
            elif len(ids):
                tokens.append(ids.astype(dtype))
                subsets.append(int(example.get("subset", 0)))
                text_bytes += len(text)
                digests.add(digest)
    except tf.errors.OpError as error:
        failure = getattr(task.source, "failure", None)
        if failure is None:
            raise
        raise failure from error
    if shared and not tokens:
        raise InputError(
            f"Every text of the {split} split of the task {task.name!r} is in another split too, "
            "and splits are kept apart: correct the task's files."
        )
    if not tokens:
        raise InputError(
            f"The {split} split of the task {task.name!r} is empty: give it more text, "
            "hold out a larger fraction, or cut plain text into smaller pieces (piece_bytes)."
        )
    return TokenizedDocuments(
        tokens, np.array(subsets, np.int64), text_bytes, frozenset(digests), shared
    )
