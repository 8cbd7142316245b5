"""The few-shot examination: names of tasks in; what the model reaches in them out.

The names may be lm-eval's, of tasks of a folder of YAML files, or salt_suite: see harness_tasks.py.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from salt_jax.data.durable_files import write_text
from salt_jax.errors import require_counts
from salt_jax.evaluation.continuations import Continuations
from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.harness import HarnessModel, Limits
from salt_jax.evaluation.harness_tasks import SUITE, TaskResult, Tasks
from salt_jax.evaluation.likelihood import Scorer
from salt_jax.run_folder import to_json

_NO_WIDTH = 1000


class FewShot:
    """Asks tasks of lm-eval; an `Examination`.

    Args:
      examinee: The model.
      names: Of tasks or groups.
      task_folder: A folder of YAML files of more tasks.
      task_data: A folder of files in the place of data sets: TASK/SPLIT.jsonl, or .parquet.
      shots: Examples in a prompt; each task's own number by default.
      limit: Documents of each task, the first ones; all by default.
      max_new_tokens: At most so many tokens are generated, whatever a task asks for.
      prepend_start: Whether the vocabulary's start comes before every text.
      save_samples: Whether to write what was asked and answered.
      allow_code_execution: Whether tasks may execute what the model writes.
      seed: Of tasks that draw tokens by lot.
      parse_special: Whether names of special tokens in a text stand for these tokens.

    Raises:
      InputError: An unknown name, a data set that isn't there, a model without its vocabulary, a
        task that generates more than the model takes, or a setting out of range.
    """

    def __init__(
        self,
        examinee: Examinee,
        names: Sequence[str],
        *,
        task_folder: str | None = None,
        task_data: str | None = None,
        shots: int | None = None,
        limit: int | None = None,
        max_new_tokens: int | None = None,
        prepend_start: bool = True,
        save_samples: bool = False,
        allow_code_execution: bool = False,
        seed: int = 0,
        parse_special: bool = True,
    ) -> None:
        require_counts(limit=limit, max_new_tokens=max_new_tokens)
        require_counts(at_least=0, shots=shots)
        self._examinee, self._limit, self._save_samples = examinee, limit, save_samples
        self._vocabulary = examinee.saved.load_vocabulary()
        self._limits = Limits(
            examinee.saved.config.max_length, prepend_start, max_new_tokens, seed, parse_special
        )
        self._tasks = Tasks(task_folder, allow_code_execution, task_data)
        self._loaded = self._tasks.load(names, shots)
        for name, task in self._loaded["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                self._limits.decoding(name, task.get_config("generation_kwargs") or {})

    def __call__(self, params: Any, folder: pathlib.Path) -> dict[str, Any]:
        """See Examination; what came out, by task and group."""
        examinee, prepend_start = self._examinee, self._limits.prepend_start
        with examinee.request_log(folder, self._vocabulary, prepend_start) as log:
            generator = examinee.generator(self._vocabulary)
            model = HarnessModel(
                Scorer(
                    examinee.saved.config,
                    params,
                    examinee.mesh,
                    examinee.rules,
                    examinee.batch_size,
                    examinee.chunk_tokens,
                ),
                Continuations(generator, params, log, prepend_start),
                self._vocabulary,
                log,
                self._limits,
            )
            results, samples = self._tasks.evaluate(model, self._loaded, self._limit)
        for name, records in samples.items() if self._save_samples else ():
            lines = "".join(f"{to_json(record)}\n" for record in records)
            write_text(folder / f"samples_{name.replace('/', '_')}.jsonl", lines)
        _print(results, examinee.title)
        return {"few_shot": {name: result.to_json() for name, result in results.items()}}


def print_tasks(names: Sequence[str], task_folder: str | None = None) -> None:
    """Prints tasks, those of salt_suite by default, with their data sets; loads none.

    Raises:
      InputError: An unknown name, or no such folder.
    """
    tasks = Tasks(task_folder)
    names = names or [SUITE]
    table = rich.table.Table(title=", ".join(names))
    for column in ("task", "data set", "part", "kind"):
        table.add_column(column)
    for name in names:
        for one in tasks.data_sets(name):
            table.add_row(one.task, one.path, one.name, one.kind)
    _show(table)


def _print(results: Mapping[str, TaskResult], title: str) -> None:
    table = rich.table.Table(title=title)
    for column in ("task", "shots", "documents", "metric", "value", "± stderr"):
        right = column not in ("task", "metric")
        table.add_column(column, justify="right" if right else "left")
    for name, result in results.items():
        facts = ("" if fact is None else str(fact) for fact in (result.shots, result.documents))
        first = (name, *facts)
        for metric, (value, stderr) in result.metrics.items():
            error = "" if stderr is None else f"{stderr:.4f}"
            table.add_row(*first, metric, f"{value:.4f}", error)
            first = ("", "", "")
        if not result.metrics and result.documents is not None:
            table.add_row(*first, "generated, not scored", "", "")
    _show(table)


def _show(table: rich.table.Table) -> None:
    """Prints a table, whole where there is no terminal whose width it must keep to."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_NO_WIDTH)
    console.print(table)
