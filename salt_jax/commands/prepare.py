"""`salt prepare`: text into a packed cache of fixed-length rows.

In: a task (text files, or any registered SeqIO task), a vocabulary, a sequence length, and who does
the work. Out: the packed cache in the output folder, summary.json with its counts, and a table of
them. TensorFlow is imported for a registered task alone.
"""

import dataclasses
import importlib
import json
import os
import time
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.data.packed_cache import PackedCache, begin_cache
from salt_jax.data.row_text import row_as_text
from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary, load_vocabulary
from salt_jax.errors import InputError
from salt_jax.preparation.cache_building import (
    Building,
    EmptySplit,
    WorkPlan,
    discard_work,
    work_of,
)
from salt_jax.preparation.corpora import Corpus, text_corpus
from salt_jax.preparation.mapping import needed_libraries
from salt_jax.preparation.packing import PackingPlan
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.runners import LOCAL, JobRunner
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary
from salt_jax.storage.buckets import state_of
from salt_jax.storage.job_journal import JobJournal
from salt_jax.storage.manifests import COMPLETED_FILE, json_digest
from salt_jax.storage.run_folder import RUN_FILE, SUMMARY_FILE, RunFolder
from salt_jax.terminal import Table, print_table, say


def prepare(
    run: RunFolder,
    *,
    task: TextFiles | RegisteredTask | None = None,
    vocabulary: Vocabulary | TrainedVocabulary | None = None,
    sequence_length: int = 128,
    packing: str = "concatenate_and_split",
    long_documents: str = "split",
    shards: int = 1,
    seed: int = 0,
    drop_duplicates: bool = False,
    skip_broken_lines: bool = False,
    drop_unknown: bool = False,
    parse_special: bool = True,
    runner: str = "local",
    workers: int | None = None,
    beam_options: Sequence[str] = (),
    show: int = 0,
    verify: bool = False,
) -> None:
    """Makes a packed cache: tokenized, packed, shuffled once, each row with a stable id.

    The same text and settings give the same bytes, on any number of workers and any runner. What is
    finished when the command is stopped is not made again when it is given again. Nor is a finished
    cache; --show=N on one prints rows of it, --verify=True checks it, and neither needs another
    setting. The output folder must be new, empty or a cache of this command's.

    Args:
      run: The folder of the cache.
      task: @text_files.TextFiles() or a function that gives one (@pile.pile_files(),
        @own_text.own_text()), or @registered_task.RegisteredTask() for any task of SeqIO's. Prompts
        have no loss weight: what a TextFiles.template makes of rows, and a task's `inputs`.
      vocabulary: @vocabularies.ByteVocabulary(), SentencePieceVocabulary or HuggingFaceVocabulary,
        or @trained_vocabulary.TrainedVocabulary() to train one on the train split. A RegisteredTask
        brings its own.
      sequence_length: Tokens a row.
      packing: "concatenate_and_split" or "whole_documents".
      long_documents: With whole_documents, what becomes of a document longer than a row: "split"
        into pieces; "drop" leaves it out; "cut" takes tokens away, first from its prompt's
        beginning. The last two are counted. Prompts and responses need one of them.
      shards: Files the train split is cut into, the others in proportion to their text. A worker
        holds one of them in memory while it packs it.
      seed: Of the order of documents and of rows.
      drop_duplicates: Of documents of a split with equal texts keep the first. They are counted in
        either case.
      skip_broken_lines: Pass over lines that are no JSON or have no text, and count them.
      drop_unknown: Leave out, and count, characters that a tokenizer has neither a piece nor an
        unknown token for, instead of refusing the text.
      parse_special: Whether the name of a special token ("<|im_start|>") in a prompt or a response
        stands for that token. In plain documents it is always text.
      runner: "local", or one of Apache Beam's: "DataflowRunner", "FlinkRunner", "SparkRunner",
        "PrismRunner", "DirectRunner".
      workers: Processes on this machine; all cores unless set.
      beam_options: Options of Beam's, each "--name=value".
      show: Print so many rows of each split as text.
      verify: Read every shard of a finished cache and compare its digest with the manifest's.

    Raises:
      InputError: Bad settings, or bad text, named with its file and line; an output folder that
        holds anything else. Nothing is left then but parts of the text that were finished before.
      Interrupted: Stopped while several processes worked.
      RunFailed: A worker process, or Beam's pipeline, failed.
    """
    if isinstance(show, bool) or not isinstance(show, int) or show < 0:
        raise InputError(f"show is {show!r}, expected a whole number of 0 or more rows.")
    finished = (run.path / COMPLETED_FILE).exists()
    if verify or (finished and show):
        _show_finished(PackedCache.open(run.path), show, verify)
        return
    if show and task is None:
        raise InputError(f"{run.path} holds no finished cache to show: correct --output_dir.")
    plan = PackingPlan(sequence_length, packing, shards, seed, long_documents)
    jobs = JobRunner(runner, workers, beam_options)
    if isinstance(task, RegisteredTask) and not task.module and runner == LOCAL:
        # Registered in this process alone.
        jobs = dataclasses.replace(jobs, workers=1)
    task = _checked(task, vocabulary, skip_broken_lines, parse_special)
    _refuse_folder(run)
    if isinstance(task, TextFiles):
        _refuse_sources_inside(run, task)
    if finished:
        cache = PackedCache.open(run.path)
        _refuse_changed_sources(cache, task)
        run.begin(may_change=_may_change(cache, task, skip_broken_lines))
        discard_work(run.path)
        if not (run.path / SUMMARY_FILE).exists():
            run.write_summary(_summary(cache, None))
        say(f"{run.path} is finished already: nothing was prepared.")
        return
    started = time.monotonic()
    _make(run, task, vocabulary, plan, drop_duplicates, drop_unknown, jobs)
    seconds = time.monotonic() - started
    cache = PackedCache.open(run.path)
    run.write_summary(_summary(cache, seconds))
    _print_counts(cache, seconds)
    _print_rows(cache, show)


def _make(
    run: RunFolder,
    task: TextFiles | RegisteredTask,
    vocabulary: Vocabulary | TrainedVocabulary | None,
    plan: PackingPlan,
    drop_duplicates: bool,
    drop_unknown: bool,
    jobs: JobRunner,
) -> None:
    """Makes the cache. Where its input turns out bad before any part of it is finished, nothing is
    left of it."""
    work = work_of(run.path)
    corpus, used, trained = _corpus_and_vocabulary(task, vocabulary, work)
    for note in used.notes:
        say(note)
    used.drop_unknown = used.drop_unknown or drop_unknown
    if corpus.has_prompts:
        plan.require_for_prompts()
    building = Building(run.path, corpus, used, plan, drop_duplicates, trained)
    run.require_space(building.estimated_bytes(), "the tokens and rows of the packed cache")
    fresh = not run.begun
    run.begin(replace=True)
    try:
        building.begin()
        building.build(
            jobs.on(work),
            lambda needed: run.require_space(needed, "the rows of the packed cache"),
        )
    except InputError as error:
        finished = 0 if isinstance(error, EmptySplit) else len(building.finished_units())
        if finished:
            raise InputError(
                f"{str(error).removesuffix('.')}; {finished} of {len(corpus.units)} parts of the "
                "text are finished and kept, and the same command goes on from there."
            ) from error
        discard_work(run.path)
        if fresh:
            begin_cache(run.path)
            run.withdraw()
        raise


def _corpus_and_vocabulary(
    task: TextFiles | RegisteredTask,
    vocabulary: Vocabulary | TrainedVocabulary | None,
    work: JobJournal,
) -> tuple[Corpus, Vocabulary, str | None]:
    """The corpus cut up, its vocabulary, and what that was trained on if it was."""
    if isinstance(task, RegisteredTask):
        assert not isinstance(vocabulary, TrainedVocabulary), "refused before"
        documents = _seqio_documents()
        return documents.task_corpus(task), documents.task_vocabulary(task, vocabulary), None
    assert vocabulary is not None, "text files need a vocabulary"
    task.refuse_equal_shards()
    with needed_libraries():
        corpus = text_corpus(task)
        if isinstance(vocabulary, Vocabulary):
            return corpus, vocabulary, None
        trained = json_digest(
            [
                dataclasses.asdict(vocabulary),
                dataclasses.asdict(task),
                [(str(file), *state_of(file)) for file in task.files("train")],
            ]
        )
        before = WorkPlan.of(work)
        if before and before.trained == trained:
            return corpus, load_vocabulary(work.path / VOCABULARY_FOLDER), trained
        say(f"Training a {vocabulary.model_type} vocabulary of {vocabulary.size:,} …")
        made = vocabulary.train(document.whole for document in task.documents("train"))
        return corpus, made, trained


def _seqio_documents() -> types.ModuleType:
    """The module that reads registered tasks, imported now: it brings TensorFlow."""
    try:
        return importlib.import_module("salt_jax.t5x.seqio_documents")
    except ModuleNotFoundError as error:
        raise InputError(
            f"A registered task needs the library {error.name}, which is not installed: "
            "pip install 'salt_jax[prepare]'."
        ) from error


def _show_finished(cache: PackedCache, show: int, verify: bool) -> None:
    if verify:
        cache.verify()
        say(f"{cache.path}: every shard has the digest that its manifest names.")
    if show:
        say(f"{cache.path} is finished: rows of it follow, nothing was prepared.")
        _print_rows(cache, show)


def _checked(
    task: TextFiles | RegisteredTask | None,
    vocabulary: Vocabulary | TrainedVocabulary | None,
    skip_broken_lines: bool,
    parse_special: bool,
) -> TextFiles | RegisteredTask:
    """The task, after what can be checked without reading its text."""
    if task is None:
        raise InputError(
            "No task was given: set its task, by a gin file of data/ "
            "(--gin_file=data/text.gin) or to your own @text_files.TextFiles()."
        )
    if isinstance(task, RegisteredTask):
        if skip_broken_lines:
            raise InputError(
                f"skip_broken_lines applies to text files, the task is SeqIO's {task.name!r}: "
                "set it where that task is registered."
            )
        if not parse_special:
            raise InputError(
                f"parse_special applies to text files, the task is SeqIO's {task.name!r}: set "
                "parse_special of the template that it is registered with."
            )
        if isinstance(vocabulary, TrainedVocabulary):
            raise InputError(
                f"A vocabulary was to be trained, but SeqIO's task {task.name!r} brings its own: "
                "leave vocabulary unset."
            )
        return task
    if vocabulary is None:
        raise InputError(
            "No vocabulary was given: set vocabulary "
            "(@vocabularies.ByteVocabulary(), or a gin file of data/)."
        )
    task = task.listed(skip_broken_lines=skip_broken_lines or task.skip_broken_lines)
    for split in task.splits:
        task.files(split)
    return task if parse_special else task.as_plain_text()


def _refuse_folder(run: RunFolder) -> None:
    """Refuses a folder that holds anything but a cache of `salt prepare`, or cannot be written."""
    existing = run.path
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise InputError(
            f"The output folder {run.path} cannot be written: choose another --output_dir."
        )
    if existing == run.path and any(run.path.iterdir()) and not _is_ours(run):
        raise InputError(
            f"The output folder {run.path} is not empty and holds no run of `salt {run.verb}`: "
            "choose a new or empty --output_dir."
        )


def _is_ours(run: RunFolder) -> bool:
    try:
        return json.loads((run.path / RUN_FILE).read_text(encoding="utf-8"))["verb"] == run.verb
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_sources_inside(run: RunFolder, task: TextFiles) -> None:
    folder = run.path.resolve()
    for file in task.all_files():
        if file.resolve().is_relative_to(folder):
            raise InputError(
                f"{file} is text to prepare and lies in the output folder {run.path}: choose an "
                "--output_dir apart from the text."
            )


def _refuse_changed_sources(cache: PackedCache, task: TextFiles | RegisteredTask) -> None:
    before = cache.manifest["sources"]
    if not before:
        return  # of a source without files
    if isinstance(task, TextFiles):
        current = task.sources()
    else:
        current = _seqio_documents().task_sources(task)
    # Names without their folders: two of a name may differ.
    recorded, now = (
        Counter((source["file"], source["digest"]) for source in sources)
        for sources in (before, current)
    )
    changed = sorted((recorded - now) + (now - recorded))
    if changed:
        raise InputError(
            f"The cache {cache.path} was made when {changed[0][0]} was another file: choose "
            "another --output_dir, or remove the cache."
        )


def _may_change(
    cache: PackedCache, task: TextFiles | RegisteredTask, skip_broken_lines: bool
) -> list[str]:
    """The settings that a finished cache would be the same with."""
    names = ["workers", "runner", "beam_options", "show"]
    if skip_broken_lines or not _broken_lines(cache):
        names += ["skip_broken_lines"]
    if not cache.manifest.get("lost_characters", 0):
        names += ["drop_unknown"]
    if isinstance(task, TextFiles) and not task.template.prompt:
        names += ["parse_special"]
    return [f"prepare.{name}" for name in names]


def _broken_lines(cache: PackedCache) -> Mapping[str, int]:
    """Lines passed over, by the name of the file."""
    broken: Counter[str] = Counter()
    for source in cache.manifest["sources"]:
        broken[source["file"]] += source.get("broken_lines", 0)
    return +broken


def _long_documents(cache: PackedCache) -> Mapping[str, int]:
    """Documents that were dropped or cut, by split; empty where such documents are split."""
    return cache.manifest.get("long_documents", {}).get("by_split", {})


def _summary(cache: PackedCache, seconds: float | None) -> dict[str, Any]:
    """What a cache holds; `seconds` is None where the process that made it is gone."""
    splits = {
        name: {key: value for key, value in cache.split(name).info.items() if key != "shards"}
        for name in cache.split_names
    }
    tokens = sum(info["tokens"] for info in splits.values())
    return {
        "digest": cache.digest,
        "sequence_length": cache.sequence_length,
        "packing": cache.manifest["packing"],
        "vocabulary": cache.manifest["vocabulary"],
        "splits": splits,
        "broken_lines": _broken_lines(cache),
        "long_documents": _long_documents(cache),
        "lost_characters": cache.manifest.get("lost_characters", 0),
        "seconds": None if seconds is None else round(seconds, 3),
        "tokens_per_second": None if seconds is None else round(tokens / seconds, 1),
    }


def _print_counts(cache: PackedCache, seconds: float) -> None:
    columns = ("split / subset", "rows", "tokens", "documents", "bytes/token")
    rows = []
    for name in cache.split_names:
        info = cache.manifest["splits"][name]
        rows.append((name, *_counts(info), f"{info['bytes'] / info['tokens']:.2f}"))
        if len(info["by_subset"]) > 1:
            for subset, counts in info["by_subset"].items():
                rows.append((f"  {subset}", *_counts(counts), ""))
    title = f"{cache.path}: rows of {cache.sequence_length} tokens"
    print_table(Table(title, columns, tuple(rows)))
    vocabulary = cache.manifest["vocabulary"]
    say(f"{vocabulary['class']} of {vocabulary['size']:,} ids; {seconds:.1f} s.")
    for file, count in _broken_lines(cache).items():
        say(f"Passed over {count:,} broken lines of {file}.")
    if count := cache.manifest.get("lost_characters", 0):
        say(f"Left out {count:,} characters that the vocabulary has no id for.")
    for name in cache.split_names:
        info = cache.manifest["splits"][name]
        if count := info["shared_documents"]:
            say(f"Left {count:,} documents out of {name}: another split has their text.")
        if count := info["duplicate_documents"]:
            done = "Left out" if cache.manifest["drop_duplicates"] else "Kept"
            say(f"{done} {count:,} documents of {name} whose text an earlier one has.")
        if count := _long_documents(cache).get(name, 0):
            done = "Dropped" if cache.manifest["long_documents"]["handling"] == "drop" else "Cut"
            say(f"{done} {count:,} documents of {name} longer than {cache.sequence_length} tokens.")


def _counts(info: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{info[name]:,}" for name in ("rows", "tokens", "documents"))


def _print_rows(cache: PackedCache, count: int) -> None:
    """The first rows of each split; the cache is shuffled, so they are a sample."""
    for name in cache.split_names:
        rows = cache.split(name)
        for row_id in range(min(count, len(rows))):
            row = rows[row_id]
            say(
                "",
                f"── {name} row {row_id} · subset: {cache.subsets[row['subset']]} · "
                f"tokens with loss weight: {int(row['loss_weights'].sum())} of "
                f"{cache.sequence_length} · segments: {int(row['segment_ids'].max())}",
                *row_as_text(row, cache.vocabulary).split("\n"),
            )
