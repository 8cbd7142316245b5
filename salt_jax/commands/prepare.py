"""`salt prepare`: turns text into a packed cache of fixed-length rows.

The output folder holds the cache, and summary.json with its counts. TensorFlow is imported only for
a registered task.
"""

import dataclasses
import importlib
import json
import os
import time
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any

from salt_jax.cli.verb import Verb
from salt_jax.commands._hub_models import local_model
from salt_jax.data.packed_cache import PackedCache, begin_cache
from salt_jax.data.row_text import row_as_text
from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary, load_vocabulary
from salt_jax.errors import InputError, needed_libraries, require_counts
from salt_jax.preparation.cache_building import (
    Building,
    EmptySplit,
    WorkPlan,
    discard_work,
    work_of,
)
from salt_jax.preparation.corpora import Corpus, text_corpus
from salt_jax.preparation.packing import Packing
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.runners import LOCAL, JobRunner
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary
from salt_jax.storage.buckets import state_of
from salt_jax.storage.job_journal import JobJournal
from salt_jax.storage.manifests import COMPLETED_FILE, json_digest
from salt_jax.storage.run_folder import RUN_FILE, SUMMARY_FILE, RunFolder
from salt_jax.terminal import Table, print_table, say

# Settings that change no result. Older versions recorded no groups, and named the shards otherwise.
_CHANGES_NO_RESULT = (
    *("show", "JobRunner", "prepare.rows", "prepare.jobs"),
    *("train_shards", "pile_files.shards", "TextFiles.shards", "TextFiles.numbered"),
)


def prepare(
    run: RunFolder,
    *,
    task: TextFiles | RegisteredTask | None = None,
    vocabulary: Vocabulary | TrainedVocabulary | None = None,
    rows: Packing = Packing(),
    jobs: JobRunner = JobRunner(),
    drop_unknown: bool = False,
    show: int = 0,
    verify: bool = False,
) -> None:
    """Makes a packed cache: tokenized, packed, shuffled once, each row with a stable id.

    The same text and settings give the same bytes, with any number of workers and any runner. The
    same command resumes a preparation that was stopped. A finished cache is not made again;
    --show=N prints rows of it and --verify=True checks it, without other settings. The output
    folder must be new, empty or a cache of this command.

    Args:
      run: The folder of the cache.
      task: What to prepare: @text_files.TextFiles(), a function that gives one
        (@pile.pile_files(), @own_text.own_text()) and then has the settings, or
        @registered_task.RegisteredTask() for any SeqIO task. Prompts, those of a template and a
        task's `inputs`, are masked out of the loss.
      vocabulary: @vocabularies.ByteVocabulary(), SentencePieceVocabulary or HuggingFaceVocabulary,
        or @trained_vocabulary.TrainedVocabulary() to train one on the train split. A
        RegisteredTask has its own.
      rows: How documents are packed into rows.
      jobs: Where the jobs run.
      drop_unknown: Drop and count characters that a tokenizer has neither a piece nor an unknown
        token for, instead of refusing the text.
      show: Print this many rows of each split as text.
      verify: Read every shard of a finished cache and compare its digest with the manifest's.

    Raises:
      InputError: Settings are wrong, text is malformed (with file and line), or the output folder
        holds anything else. Finished parts of the text are kept.
      Interrupted: Stopped while several processes worked.
      RunFailed: A worker process, or Beam's pipeline, failed.
    """
    require_counts(0, show=show)
    finished = (run.path / COMPLETED_FILE).exists()
    if verify or (finished and show):
        _show_finished(PackedCache.open(run.path), show, verify)
        return
    if show and task is None:
        raise InputError(f"{run.path} holds no finished cache to show: correct --output_dir.")
    if isinstance(task, RegisteredTask) and not task.module and jobs.runner == LOCAL:
        jobs = dataclasses.replace(jobs, workers=1)  # registered in this process alone
    task = _checked(task, vocabulary)
    _refuse_folder(run)
    if isinstance(task, TextFiles):
        _refuse_sources_inside(run, task)
    if finished:
        cache = PackedCache.open(run.path)
        _refuse_changed_sources(cache, task)
        run.begin(may_change=_may_change(cache, task), upgrade=_with_current_names)
        discard_work(run.path)
        if not (run.path / SUMMARY_FILE).exists():
            run.write_summary(_summary(cache, None))
        say(f"{run.path} is finished already: nothing was prepared.")
        return
    started = time.monotonic()
    _make(run, task, vocabulary, rows, jobs, drop_unknown)
    seconds = time.monotonic() - started
    cache = PackedCache.open(run.path)
    run.write_summary(_summary(cache, seconds))
    _print_counts(cache, seconds)
    _print_rows(cache, show)


def model_vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a model: of a run's folder, or of one of the Hub, "hf:OWNER/NAME"."""
    return load_vocabulary(local_model(model))


def _make(
    run: RunFolder,
    task: TextFiles | RegisteredTask,
    vocabulary: Vocabulary | TrainedVocabulary | None,
    rows: Packing,
    jobs: JobRunner,
    drop_unknown: bool,
) -> None:
    """Makes the cache; leaves nothing if the input is bad and no part is finished."""
    work = work_of(run.path)
    corpus, used, trained = _corpus_and_vocabulary(task, vocabulary, work)
    for note in used.notes:
        say(note)
    used.drop_unknown = used.drop_unknown or drop_unknown
    if corpus.has_prompts:
        rows.require_for_prompts()
    building = Building(run.path, corpus, used, rows, trained)
    run.require_space(building.estimated_bytes(), "the tokens and rows of the packed cache")
    fresh = not run.begun
    run.begin(replace=True)
    try:
        building.begin()
        building.build(jobs, run.require_space)
    except InputError as error:
        finished = 0 if isinstance(error, EmptySplit) else len(building.finished_units())
        if finished:
            raise InputError(
                f"{str(error).removesuffix('.')}; {finished} of {len(corpus.units)} parts of the "
                "text are finished and kept, and the same command resumes from them."
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
    """The corpus, its vocabulary, and the digest of the vocabulary's training inputs, or None."""
    if isinstance(task, RegisteredTask):
        assert not isinstance(vocabulary, TrainedVocabulary), "refused before"
        documents = _seqio_documents()
        return documents.task_corpus(task), documents.task_vocabulary(task, vocabulary), None
    assert vocabulary is not None, "refused before"
    task.refuse_equal_shards()
    with needed_libraries("This text", "prepare"):
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
    """The module that reads registered tasks, imported late because it imports TensorFlow."""
    with needed_libraries("A registered task", "prepare"):
        return importlib.import_module("salt_jax.t5x.seqio_documents")


def _show_finished(cache: PackedCache, show: int, verify: bool) -> None:
    if verify:
        cache.verify()
        say(f"{cache.path}: every shard has the digest that its manifest names.")
    if show:
        say(f"{cache.path} is finished: rows of it follow, nothing was prepared.")
        _print_rows(cache, show)


def _checked(
    task: TextFiles | RegisteredTask | None, vocabulary: Vocabulary | TrainedVocabulary | None
) -> TextFiles | RegisteredTask:
    """The task, after the checks that don't read its text."""
    if task is None:
        raise InputError(
            "No task was given: set --train to a pattern of text files, or task by a gin file of "
            "data/ (--gin_file=data/text.gin) or your own."
        )
    if isinstance(task, RegisteredTask):
        if isinstance(vocabulary, TrainedVocabulary):
            raise InputError(
                f"A vocabulary was to be trained, but SeqIO's task {task.name!r} has its own: "
                "leave vocabulary unset."
            )
        return task
    if vocabulary is None:
        raise InputError(
            "No vocabulary was given: set --size (4096, say) to train one, or vocabulary by a gin "
            "file of data/ or your own."
        )
    task = task.listed()
    for split in task.splits:
        task.files(split)
    return task


def _refuse_folder(run: RunFolder) -> None:
    """Refuses a folder that holds anything but a cache of `salt prepare`, or cannot be written."""
    existing = run.path
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise InputError(
            f"The output folder {run.path} cannot be written: choose another --output_dir."
        )
    if existing == run.path and any(run.path.iterdir()) and not _is_own_folder(run):
        raise InputError(
            f"The output folder {run.path} is not empty and holds no run of `salt {run.verb}`: "
            "choose a new or empty --output_dir."
        )


def _is_own_folder(run: RunFolder) -> bool:
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
        return  # a source without files
    if isinstance(task, TextFiles):
        current = task.sources()
    else:
        current = _seqio_documents().task_sources(task)
    # Names without their folders: two files may share one.
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


def _may_change(cache: PackedCache, task: TextFiles | RegisteredTask) -> list[str]:
    """The settings that may change without changing the finished cache."""
    names = [*_CHANGES_NO_RESULT]
    text = task if isinstance(task, TextFiles) else None
    if not _broken_lines(cache) or (text and text.skip_broken_lines):
        names += ["skip_broken_lines"]
    if not cache.manifest.get("lost_characters", 0):
        names += ["drop_unknown"]
    if not (text and text.template.prompt):
        names += ["parse_special"]
    return names


def _with_current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a cache's config.gin under their current names.

    In older versions all were settings of the verb, two of them also of the task.
    """
    settings = dict(recorded)
    for name, overrides in (("skip_broken_lines", True), ("parse_special", False)):
        if settings.pop(f"prepare.prepare.{name}", None) is overrides:
            settings |= {each: overrides for each in settings if each.endswith(f".{name}")}
    for group, name in ((Packing, "packing.Packing"), (JobRunner, "runners.JobRunner")):
        for field in dataclasses.fields(group):
            if (former := f"prepare.prepare.{field.name}") in settings:
                settings[f"{name}.{field.name}"] = settings.pop(former)
    return settings


def _broken_lines(cache: PackedCache) -> Mapping[str, int]:
    """Malformed lines that were skipped, by the name of the file."""
    broken: Counter[str] = Counter()
    for source in cache.manifest["sources"]:
        broken[source["file"]] += source.get("broken_lines", 0)
    return +broken


def _long_documents(cache: PackedCache) -> Mapping[str, int]:
    """Documents that were dropped or cut, by split; empty if such documents are split."""
    return cache.manifest.get("long_documents", {}).get("by_split", {})


def _summary(cache: PackedCache, seconds: float | None) -> dict[str, Any]:
    """A cache's summary; `seconds` is None if the process that made it was stopped."""
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
        say(f"Skipped {count:,} malformed lines of {file}.")
    if count := cache.manifest.get("lost_characters", 0):
        say(f"Dropped {count:,} characters that the vocabulary has no id for.")
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
    """Prints the first rows of each split, a sample: the cache is shuffled."""
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


VERB = Verb(prepare)
