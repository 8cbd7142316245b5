"""The documents of a registered SeqIO task, shard by shard, for `salt prepare`.

A document is a task's `targets`, preceded by its `inputs`, if any, as a prompt. Documents are in
the task's unshuffled order.
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
from salt_jax.preparation.corpora import Corpus, Unit
from salt_jax.preparation.part_files import TokenizedDocument
from salt_jax.preparation.reading_log import ReadingLog, SourceFile
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.t5x.quiet_tensorflow import seqio, tf
from salt_jax.t5x.seqio_adapters import SubsetVocabulary, vocabulary_of
from salt_jax.t5x.text_tasks import TextFilesSource


@dataclasses.dataclass(frozen=True)
class TaskUnit(Unit):
    """The shard of a split of a SeqIO task's source; the task's preprocessing is not part of its
    identity."""

    task: RegisteredTask
    shard: int = 0
    shards: int = 1

    def documents(self, vocabulary: Vocabulary, log: ReadingLog) -> Iterator[TokenizedDocument]:
        """See Unit; documents without tokens are skipped."""
        task = find_task(self.task)
        for file in self._files(task):
            log.note(file)
        names = subset_names(task)
        dataset = task.get_dataset(
            sequence_length=None,
            split=self.split,
            shuffle=False,
            shard_info=seqio.ShardInfo(self.shard, self.shards) if self.shards > 1 else None,
            try_in_mem_cache=False,
        )
        try:
            for example in dataset.as_numpy_iterator():
                ids_T, text = _ids_and_text(example, "targets", vocabulary)
                prompt_P, prompt = _ids_and_text(example, "inputs", vocabulary)
                if len(ids_T):
                    yield TokenizedDocument(
                        np.concatenate([prompt_P, ids_T]),
                        self.split,
                        names[int(example.get("subset", 0))],
                        hashlib.blake2b(prompt + text, digest_size=16).digest(),
                        len(text),
                        len(prompt_P),
                    )
        except tf.errors.OpError as error:
            failure = getattr(task.source, "failure", None)
            if failure is None:
                raise
            raise failure from error

    def sources(self, log: ReadingLog) -> list[SourceFile]:
        """See Unit."""
        task = find_task(self.task)
        if isinstance(task.source, TextFilesSource):
            log = task.source.log
        return log.sources(self._files(task))

    def _files(self, task: seqio.Task) -> list[pathlib.Path]:
        """The local files of the shard; none for a function (seqio.FunctionDataSource) or a URL."""
        if isinstance(task.source, TextFilesSource):
            return task.source.files.files(self.split)
        if isinstance(task.source, seqio.FunctionDataSource):
            return []
        # SeqIO assigns every `shards`-th file to a shard.
        names = list(task.source.list_shards(self.split))[self.shard :: self.shards]
        return [pathlib.Path(name) for name in names if os.path.isfile(name)]


def find_task(task: RegisteredTask) -> seqio.Task:
    """The task in SeqIO's registry; InputError if its module cannot be imported, or it is not
    registered."""
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
            f"SeqIO has no task {task.name!r}, it has {names}: correct RegisteredTask.name, or "
            "set RegisteredTask.module to the module that registers it."
        )
    return seqio.TaskRegistry.get(task.name)


def task_vocabulary(task: RegisteredTask, given: Vocabulary | None) -> Vocabulary:
    """The vocabulary of a task's targets; InputError if it is of an unknown kind or differs from
    `given`."""
    own = vocabulary_of(find_task(task).output_features["targets"].vocabulary, task.name)
    if given is not None and given != own:
        raise InputError(
            f"The vocabulary given is {given}, SeqIO's task {task.name!r} has {own}: "
            "leave vocabulary unset, or change the task's."
        )
    return own


def task_corpus(task: RegisteredTask) -> Corpus:
    """The task's splits, divided into the shards of its source; InputError if it has none of the
    splits of a cache."""
    registered = find_task(task)
    units, sizes = [], {}
    # The source's splits, since the task's raise an error of SeqIO if there are none.
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
    """The subset names of the task's feature `subset`; the task's own name if it has none."""
    feature = task.output_features.get("subset")
    if feature is None:
        return (task.name,)
    if isinstance(feature.vocabulary, SubsetVocabulary):
        return feature.vocabulary.names
    return tuple(f"subset {index}" for index in range(feature.vocabulary.vocab_size))


def task_sources(task: RegisteredTask) -> list[dict[str, Any]]:
    """Name, bytes and digest of every file of a task's splits, as in a manifest."""
    registered = find_task(task)
    splits = [split for split in SPLITS if split in registered.source.splits]
    files = {file for split in splits for file in TaskUnit("", split, task)._files(registered)}
    return [source.as_source() for source in ReadingLog().sources(sorted(files))]


def _ids_and_text(
    example: Mapping[str, Any], feature: str, vocabulary: Vocabulary
) -> tuple[np.ndarray, bytes]:
    """A feature's ids and the text they encode; both empty if there is no such feature."""
    ids_T = np.asarray(example.get(feature, ()), np.int32)
    if f"{feature}_pretokenized" in example:
        return ids_T, example[f"{feature}_pretokenized"]
    return ids_T, vocabulary.decode(ids_T.tolist()).encode()
