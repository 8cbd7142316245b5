"""The few-shot examination: names of tasks in; what the model reaches in them out.

The names may be lm-eval's, of tasks of a folder of YAML files, or salt_suite: see harness_tasks.py.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import require_counts
from salt_jax.evaluation.continuations import Continuations
from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.harness import HarnessModel, Limits
from salt_jax.evaluation.harness_tasks import SUITE, TaskResult, Tasks
from salt_jax.evaluation.likelihood import Scorer
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.run_folder import to_json
from salt_jax.terminal import Table, print_table


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
        print_table(_table(results, examinee.title))
        return {"few_shot": {name: result.to_json() for name, result in results.items()}}


def print_tasks(names: Sequence[str], task_folder: str | None = None) -> None:
    """Prints tasks, those of salt_suite by default, with their data sets; loads none.

    Raises:
      InputError: An unknown name, or no such folder.
    """
    tasks = Tasks(task_folder)
    names = names or [SUITE]
    columns = ("task", "data set", "part", "kind")
    found = [one for name in names for one in tasks.data_sets(name)]
    rows = tuple((one.task, one.path, one.name, one.kind) for one in found)
    print_table(Table(", ".join(names), columns, rows, names=len(columns)))


def _table(results: Mapping[str, TaskResult], title: str) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        counts = ["" if fact is None else str(fact) for fact in (result.shots, result.documents)]
        for metric, (value, stderr) in result.metrics.items():
            error = "" if stderr is None else f"{stderr:.4f}"
            rows.append((name, metric, *counts, f"{value:.4f}", error))
            name, counts = "", ["", ""]
        if not result.metrics and result.documents is not None:
            rows.append((name, "generated, not scored", *counts, "", ""))
    columns = ("task", "metric", "shots", "documents", "value", "± stderr")
    return Table(title, columns, tuple(rows), names=2)
