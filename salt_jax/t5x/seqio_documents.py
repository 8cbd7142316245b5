"""Documents of a registered SeqIO task, shard by shard.

In: a task's name, a split, a shard. Out: every document's ids, subset and digest of its text, in
the task's unshuffled order, and the files that they stand in. Where the task has `inputs`, they are
the prompt before the `targets`. Memory holds what SeqIO holds of a shard.
"""

import dataclasses
import hashlib
import importlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from salt_jax.data.packed_cache import SPLITS
from salt_jax.data.vocabularies import Vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.corpora import Corpus
from salt_jax.preparation.part_files import TokenizedDocument
from salt_jax.preparation.reading_log import ReadingLog, SourceFile
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.t5x.quiet_tensorflow import seqio, tf
from salt_jax.t5x.seqio_adapters import SubsetVocabulary, vocabulary_of
from salt_jax.t5x.text_tasks import TextFilesSource


@dataclasses.dataclass(frozen=True)
class TaskUnit:
    """A shard of a SeqIO task's source.

    Attributes:
      name: Names its part file.
      split: The split it is of.
      task: The task.
      shard: Which shard.
      shards: Of how many.
    """

    name: str
    split: str
    task: RegisteredTask
    shard: int
    shards: int

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits its documents may belong to."""
        return (self.split,)

    def identity(self) -> dict[str, Any]:
        """What its documents depend on, apart from the task itself."""
        return dataclasses.asdict(self)

    def documents(self, vocabulary: Vocabulary, log: ReadingLog) -> Iterator[TokenizedDocument]:
        """Its documents.

        Raises:
          InputError: What the task's readers raise, or no such task.
        """
        task = find_task(self.task)
        return read_documents(task, self.split, vocabulary, self.shard, self.shards, log)

    def sources(self, log: ReadingLog) -> list[SourceFile]:
        """The files of the shard as they were read."""
        return sources(find_task(self.task), self.split, self.shard, self.shards, log)


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


def task_vocabulary(task: RegisteredTask, given: Vocabulary | None) -> Vocabulary:
    """The vocabulary of a task's targets.

    Args:
      task: The task.
      given: None, or one that must equal it.

    Raises:
      InputError: No such task, a vocabulary of an unknown kind, or another one given.
    """
    own = vocabulary_of(find_task(task).output_features["targets"].vocabulary, task.name)
    if given is not None and given != own:
        raise InputError(
            f"The vocabulary given is {given}, SeqIO's task {task.name!r} has {own}: "
            "leave vocabulary unset, or change the task's."
        )
    return own


def task_corpus(task: RegisteredTask) -> Corpus:
    """The task's splits, cut up as its source is.

    Raises:
      InputError: No such task, or none of the splits that a cache has.
    """
    registered = find_task(task)
    units, sizes = [], {}
    # The source's, since a task without any raises an error of SeqIO's own.
    for split in [split for split in SPLITS if split in registered.source.splits]:
        shards = len(registered.source.list_shards(split))
        sizes[split] = float(shards)
        units += [
            TaskUnit(f"{split}-{shard:05d}", split, task, shard, shards) for shard in range(shards)
        ]
    if not units:
        raise InputError(
            f"SeqIO's task {task.name!r} has none of the splits {', '.join(SPLITS)}: build its "
            "dataset first (`tfds build`; TFDS_DATA_DIR says where it lies), or correct the task."
        )
    prompts = "inputs" in registered.output_features
    return Corpus(tuple(units), sizes, subset_names(registered), has_prompts=prompts)


def subset_names(task: seqio.Task) -> tuple[str, ...]:
    """The names that the task's `subset` indexes; the task's own name where it has none."""
    feature = task.output_features.get("subset")
    if feature is None:
        return (task.name,)
    if isinstance(feature.vocabulary, SubsetVocabulary):
        return feature.vocabulary.names
    return tuple(f"subset {index}" for index in range(feature.vocabulary.vocab_size))


def read_documents(
    task: seqio.Task,
    split: str,
    vocabulary: Vocabulary,
    shard: int = 0,
    shards: int = 1,
    log: ReadingLog | None = None,
) -> Iterator[TokenizedDocument]:
    """Documents of one shard of a split; those without any token are left out.

    Args:
      task: The task.
      split: One of its splits.
      vocabulary: The vocabulary of its targets.
      shard: Which shard of its source.
      shards: Of how many.
      log: Where to note what the files are when their reading begins.

    Raises:
      InputError: What the files' readers raise.
    """
    if log is not None:
        for file in source_files(task, split, shard, shards):
            log.note(file)
    names = subset_names(task)
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=False,
        shard_info=seqio.ShardInfo(shard, shards) if shards > 1 else None,
        try_in_mem_cache=False,
    )
    try:
        for example in dataset.as_numpy_iterator():
            ids_T, text = _ids_and_text(example, "targets", vocabulary)
            prompt_P, prompt = _ids_and_text(example, "inputs", vocabulary)
            if len(ids_T):
                subset = names[int(example.get("subset", 0))]
                digest = hashlib.blake2b(prompt + text, digest_size=16).digest()
                whole_T = np.concatenate([prompt_P, ids_T])
                yield TokenizedDocument(whole_T, split, subset, digest, len(text), len(prompt_P))
    except tf.errors.OpError as error:
        failure = getattr(task.source, "failure", None)
        if failure is None:
            raise
        raise failure from error


def _ids_and_text(
    example: Mapping[str, Any], feature: str, vocabulary: Vocabulary
) -> tuple[np.ndarray, bytes]:
    """A feature's ids and the text that they stand for; nothing where there is no such feature."""
    ids_T = np.asarray(example.get(feature, ()), np.int32)
    if f"{feature}_pretokenized" in example:
        return ids_T, example[f"{feature}_pretokenized"]
    return ids_T, vocabulary.decode(ids_T.tolist()).encode()


def source_files(
    task: seqio.Task, split: str, shard: int = 0, shards: int = 1
) -> list[pathlib.Path]:
    """The files on this machine that a shard of a split is read from; a source that is a function
    (seqio.FunctionDataSource) or lies behind a URL has none."""
    if isinstance(task.source, TextFilesSource):
        return task.source.files.files(split)
    if isinstance(task.source, seqio.FunctionDataSource):
        return []
    # SeqIO gives every shards-th file to a shard.
    names = list(task.source.list_shards(split))[shard::shards]
    return [pathlib.Path(name) for name in names if os.path.isfile(name)]


def sources(
    task: seqio.Task, split: str, shard: int = 0, shards: int = 1, log: ReadingLog | None = None
) -> list[SourceFile]:
    """The files of a shard of a split, as `log` says they were read or as they are now.

    Raises:
      InputError: A file changed while it was read.
    """
    if isinstance(task.source, TextFilesSource):
        log = task.source.log
    return (log or ReadingLog()).sources(source_files(task, split, shard, shards))


def task_sources(task: RegisteredTask) -> list[dict[str, Any]]:
    """Name, bytes and digest of every file of a task's splits, as in a manifest.

    Raises:
      InputError: No such task.
    """
    registered = find_task(task)
    files = {
        file
        for split in SPLITS
        if split in registered.source.splits
        for file in source_files(registered, split)
    }
    return [source.as_source() for source in ReadingLog().sources(sorted(files))]
