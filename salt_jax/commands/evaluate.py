"""`salt evaluate`: how well a checkpoint predicts held-out rows, few-shot tasks of lm-eval,
and its own responses to prompts.

    salt evaluate --model=out/salt --cache=out/cache --output_dir=out/test
    salt evaluate --model=out/salt --tasks=gsm8k --tasks=ai2_arc --shots=5 --output_dir=out/few_shot
    salt evaluate --model=out/salt --tasks=salt_suite --output_dir=out/suite
    salt evaluate --model=out/tuned --gin_file=data/responses.gin … --output_dir=out/answers
    salt evaluate --list_tasks=True --output_dir=out/suite

Held-out rows give log-perplexity, bits per byte and next-token accuracy, whole and by subset. Tasks
are any of lm-evaluation-harness's or of a folder of YAML files in its format; salt_suite are those
of the SALT paper. Started again after a kill it asks the model nothing twice.
"""

import dataclasses
import importlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from jax.sharding import Mesh

from salt_jax.data.durable_files import write_text
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.evaluation.responses import Answer, Examination, Responses, mean_scores
from salt_jax.run_folder import RunFolder, to_json
from salt_jax.training import compilation, partitioning
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.evaluation import Evaluation, Evaluator
from salt_jax.training.ledger import Cost

_REQUESTS_FILE = "requests.jsonl"
RESPONSES_FILE = "responses.jsonl"


def evaluate(
    run: RunFolder,
    *,
    model: str | None = None,
    cache: str | None = None,
    responses: Responses | None = None,
    step: int | None = None,
    split: str = "test",
    rows: int | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    prepend_start: bool = True,
    save_samples: bool = False,
    allow_code_execution: bool = False,
    seed: int = 0,
    list_tasks: bool = False,
    batch_size: int = 64,
    mesh: partitioning.MeshConfig = partitioning.MeshConfig(),  # noqa: B008 (frozen)
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
    compilation_cache: str = compilation.DEFAULT_FOLDER,
) -> None:
    """Evaluates a checkpoint on held-out rows, on few-shot tasks, or by its responses.

    Args:
      run: The folder for the results.
      model: The run folder of the model.
      cache: A packed cache with the model's vocabulary.
      responses: Instead of a cache, @responses.Responses(): prompts, and how to judge what the
        model makes of them (--gin_file=data/responses.gin). Writes responses.jsonl.
      step: The checkpoint; the newest by default.
      split: "test" or "validation".
      rows: Rows to read, from the first on; all by default.
      tasks: Names of tasks or groups; the flag may be given again.
      task_folder: A folder of YAML files of more tasks.
      shots: Examples in a prompt, but for tasks that are meant to have none; each task's own number
        by default.
      limit: Documents of each task, the first ones; all by default.
      max_new_tokens: The most tokens of an answer, where a task asks for more.
      prepend_start: Whether the vocabulary's start comes before every text of a task; False for
        models that were trained without one, such as Pythia.
      save_samples: Write samples_TASK.jsonl: what was asked and answered.
      allow_code_execution: Execute the programs that a model writes, in tasks that score them so;
        otherwise such tasks are only generated for.
      seed: Of tasks that draw tokens by lot.
      list_tasks: Print the tasks of salt_suite, or of `tasks`, with their data sets; nothing else.
      batch_size: Rows, sequences of tasks or prompts at once.
      mesh: How many devices along each mesh axis.
      rules: From the model's logical axes to the mesh's.
      chunk_tokens: Tokens whose logits a device holds at once.
      compilation_cache: Where compiled programs are kept between runs; "" keeps none.

    Raises:
      InputError: No such model, cache, split, task or data set, another vocabulary, bad examples.
    """
    if list_tasks:
        _list_tasks(tasks, task_folder)
        return
    if model is None:
        raise InputError("model is not set: add --model=VALUE.")
    _check_what(cache, tasks, responses)
    if responses is not None:
        compilation.use_compilation_cache(compilation_cache)
        saved = find_model(model, step, "model")
        _examine(run, responses, saved, mesh.make(), rules, batch_size)
        return
    packed = PackedCache.open(cache) if cache is not None else None
    saved = find_model(model, step, "model", packed)
    _check_counts(batch_size=batch_size, rows=rows, chunk_tokens=chunk_tokens, limit=limit)
    _check_counts(max_new_tokens=max_new_tokens)
    if shots is not None and shots < 0:
        raise InputError(f"shots is {shots} and must be at least 0: change --shots.")
    device_mesh = mesh.make()
    where = (device_mesh, rules, batch_size, chunk_tokens)
    evaluator = None
    if packed is not None:
        evaluator = Evaluator(
            saved.config, packed, split, batch_size, device_mesh, rules, rows, chunk_tokens
        )
    few_shot = None
    if tasks:
        few_shot = _few_shot().FewShot(saved, tasks, shots, task_folder, allow_code_execution)
    run.begin()
    compilation.use_compilation_cache(compilation_cache)
    params = saved.load_params(device_mesh, rules)
    summary: dict[str, Any] = {"model": saved.identity}
    if evaluator is not None and packed is not None:
        start = time.perf_counter()
        evaluation = evaluator(params)
        seconds = time.perf_counter() - start
        _print(evaluation, f"{saved.path} at step {saved.step} on {split}")
        read = min(rows or len(packed.split(split)), len(packed.split(split)))
        cost = Cost.of(saved.config, read, packed.sequence_length, seconds)
        summary |= {"split": split, "rows": read, **evaluation.to_json()}
        summary |= dataclasses.asdict(cost)
    if few_shot is not None:
        with few_shot.asking(
            run.path / _REQUESTS_FILE,
            params,
            *where,
            prepend_start=prepend_start,
            max_new_tokens=max_new_tokens,
            seed=seed,
        ) as harness:
            results, samples = few_shot.tasks.evaluate(harness, few_shot.loaded, limit)
        for name, records in samples.items() if save_samples else ():
            lines = "".join(f"{to_json(record)}\n" for record in records)
            write_text(run.path / f"samples_{name.replace('/', '_')}.jsonl", lines)
        _print_tasks(results, f"{saved.path} at step {saved.step}")
        summary["few_shot"] = {name: result.to_json() for name, result in results.items()}
    run.write_summary(summary)


def _check_what(cache: str | None, tasks: Sequence[str], responses: Responses | None) -> None:
    if responses is not None and (cache is not None or tasks):
        raise InputError(
            "Responses are asked for beside a cache or tasks: leave out --cache and --tasks, or "
            "data/responses.gin."
        )
    if responses is None and cache is None and not tasks:
        raise InputError(
            "There is nothing to evaluate on: add --cache=FOLDER, --tasks=NAME or both, or "
            "--gin_file=data/responses.gin."
        )


def _check_counts(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value} and must be at least 1: change --{name}.")


def _list_tasks(names: Sequence[str], folder: str | None) -> None:
    module = _few_shot()
    tasks = module.Tasks(folder)
    names = names or [module.SUITE]
    table = rich.table.Table(title=", ".join(names))
    for column in ("task", "data set", "part", "kind"):
        table.add_column(column)
    for name in names:
        for one in tasks.data_sets(name):
            table.add_row(one.task, one.path, one.name, one.kind)
    rich.console.Console().print(table)


def _few_shot() -> Any:
    """salt_jax.evaluation.few_shot, for which lm-eval must be installed."""
    try:
        return importlib.import_module("salt_jax.evaluation.few_shot")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("salt_jax"):
            raise
        raise InputError(
            f"--tasks needs the library {error.name}, which is not installed: "
            "pip install 'salt_jax[eval]'."
        ) from error


def _print_tasks(results: Mapping[str, Any], title: str) -> None:
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
    rich.console.Console().print(table)


def _examine(
    run: RunFolder,
    responses: Responses,
    saved: SavedModel,
    mesh: Mesh,
    rules: partitioning.Rules,
    batch_size: int,
) -> None:
    examination = Examination(responses, saved, mesh, rules, batch_size)
    run.begin()
    params = saved.load_params(mesh, rules)
    start = time.perf_counter()
    answers = examination(params)
    seconds = time.perf_counter() - start
    scores = mean_scores(answers)
    _print_answers(answers, scores, f"{saved.path} at step {saved.step}")
    if examination.cut_prompts:
        print(f"{examination.cut_prompts:,} prompts were too long and lost their beginning.")
    lines = [to_json(dataclasses.asdict(answer)) for answer in answers]
    write_text(run.path / RESPONSES_FILE, "\n".join(lines) + "\n")
    run.write_summary(
        {
            "model": saved.identity,
            "metric": responses.metric,
            "examples": len(answers),
            "cut_prompts": examination.cut_prompts,
            **scores,
            "seconds": seconds,
        }
    )


def _print_answers(answers: Sequence[Answer], scores: dict[str, float], title: str) -> None:
    table = rich.table.Table(title=title)
    table.add_column("")
    table.add_column(f"mean of {len(answers):,}", justify="right")
    for name, score in scores.items():
        table.add_row(name, f"{score:.2%}")
    rich.console.Console().print(table)


def _print(evaluation: Evaluation, title: str) -> None:
    table = rich.table.Table(title=title)
    for column in ("", "log-perplexity", "bits per byte", "next-token accuracy", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    for name, quality in [("all", evaluation.whole), *evaluation.by_subset.items()]:
        table.add_row(
            name,
            f"{quality.log_perplexity:.4f}",
            f"{quality.bits_per_byte:.4f}",
            f"{quality.next_token_accuracy:.2%}",
            f"{quality.tokens:,}",
        )
    rich.console.Console().print(table)
