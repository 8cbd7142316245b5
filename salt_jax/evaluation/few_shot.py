"""Examination on few-shot tasks: lm-eval's, salt_suite's, or those of a folder of YAML files."""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import InputError, needed_libraries, require_counts
from salt_jax.evaluation.answers import logged_answers
from salt_jax.evaluation.examination import Examine, Examinee
from salt_jax.inference.generation import Sampling
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.run_folder import to_json
from salt_jax.storage.user_folders import cache_folder
from salt_jax.terminal import Table, print_table

SUITE = "salt_suite"


@dataclasses.dataclass(frozen=True)
class FewShot:
    """The tasks and how they are run, an `Examination`.

    Attributes:
      tasks: Names of tasks or groups; the flag may be repeated.
      shots: Examples in a prompt, except in tasks that are meant to have none; each task's own
        number by default.
      limit: Only the first documents of each task; all by default.
      task_folder: A folder of YAML files of more tasks. They can run any code: use one you trust.
      task_data: A folder of files that replace tasks' data sets: TASK/SPLIT.jsonl, or .parquet.
      max_new_tokens: Caps the tokens of an answer where a task allows more.
      prepend_start: Whether the vocabulary's start comes before every text, as before every segment
        in training; False for models trained without one, such as Pythia.
      seed: Seed of tasks that sample tokens.
      bootstrap_iters: Bootstrap resamplings for the standard error of a metric without a formula
        for it; lm-eval's own 100,000 take minutes.
      save_samples: Write samples_TASK.jsonl: documents, prompts, answers and metrics.
      allow_code_execution: Execute the programs that a model writes, in tasks that score them so;
        otherwise answers to such tasks are generated and not scored.
    """

    tasks: Sequence[str] = ()
    shots: int | None = None
    limit: int | None = None
    task_folder: str | None = None
    task_data: str | None = None
    max_new_tokens: int | None = None
    prepend_start: bool = True
    seed: int = 0
    bootstrap_iters: int = 1000
    save_samples: bool = False
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        require_counts(limit=self.limit, max_new_tokens=self.max_new_tokens)
        require_counts(at_least=0, shots=self.shots, bootstrap_iters=self.bootstrap_iters)
        Sampling(seed=self.seed)  # refuses a bad one

    @property
    def is_asked(self) -> bool:
        """Whether tasks are set; InputError if not and another setting is."""
        for name in ("shots", "limit", "task_data", "max_new_tokens", "task_folder"):
            if not self.tasks and getattr(self, name) is not None:
                raise InputError(
                    f"{name} is for few-shot tasks: add --tasks=NAME, or leave it unset."
                )
        return bool(self.tasks)

    def prepare(self, examinee: Examinee) -> Examine:
        """See `Examination`; InputError for an unknown name, a missing data set, a model without
        its vocabulary, or a task that generates more than fits the model."""
        tasks, harness = _lm_eval_module("harness_tasks"), _lm_eval_module("harness")
        examinee.vocabulary  # noqa: B018 (refuses a model without one)
        loaded = tasks.load(self)
        max_length = examinee.saved.config.max_length
        for task in tasks.leaves(loaded):
            if task.OUTPUT_TYPE == "generate_until":
                own = task.get_config("generation_kwargs") or {}
                harness.decoding_of(task.task_name, own, self, max_length)

        def examine(folder: pathlib.Path) -> dict[str, Any]:
            with logged_answers(examinee, folder, self.prepend_start) as answers:
                model = harness.HarnessModel(examinee, answers, self)
                results, samples = harness.evaluate(model, loaded, self)
            for name, records in samples.items() if self.save_samples else ():
                lines = "".join(f"{to_json(record)}\n" for record in records)
                write_text(folder / f"samples_{name.replace('/', '_')}.jsonl", lines)
            print_table(_table(results, examinee.title))
            return {"few_shot": results}

        return examine

    def print_tasks(self) -> None:
        """Prints the tasks, by default those of salt_suite, with their data sets; loads none.
        InputError for an unknown name, or no such folder."""
        names = self.tasks or [SUITE]
        rows = _lm_eval_module("harness_tasks").data_sets(self, names)
        columns = ("task", "data set", "part", "kind")
        print_table(Table(", ".join(names), columns, tuple(rows), names=len(columns)))


def _lm_eval_module(name: str) -> Any:
    """A module of this folder that needs lm-eval, which may not be installed."""
    if not os.environ.keys() & {"HF_HOME", "XDG_CACHE_HOME"}:  # read when it is imported
        os.environ["HF_HOME"] = str(cache_folder("huggingface", "HF_HOME"))
    with needed_libraries("--tasks", "eval"):
        return importlib.import_module(f"salt_jax.evaluation.{name}")


def _table(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        counts = ["" if n is None else str(n) for n in (result["shots"], result["documents"])]
        for metric, found in result["metrics"].items():
            error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            rows.append((name, metric, *counts, f"{found['value']:.4f}", error))
            name, counts = "", ["", ""]
        if not result["metrics"] and result["documents"] is not None:
            rows.append((name, "generated, not scored", *counts, "", ""))
    columns = ("task", "metric", "shots", "documents", "value", "± stderr")
    return Table(title, columns, tuple(rows), names=2)
