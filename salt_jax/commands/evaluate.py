"""`salt evaluate`: held-out rows, few-shot tasks of lm-eval, and a model's responses to prompts.

    salt evaluate --model=out/salt --cache=out/cache --output_dir=out/test
    salt evaluate --model=out/salt --tasks=gsm8k --tasks=ai2_arc --shots=5 --output_dir=out/few_shot
    salt evaluate --model=out/salt --tasks=salt_suite --output_dir=out/suite
    salt evaluate --model=out/tuned --gin_file=data/responses.gin … --output_dir=out/answers
    salt evaluate --list_tasks=True

Three examinations, of which one run may hold several. Held-out rows (--cache) give log-perplexity,
bits per byte and next-token accuracy, whole and by subset. Tasks (--tasks) are any of
lm-evaluation-harness's or of a folder of YAML files in its format; salt_suite are those of the SALT
paper. Responses (data/responses.gin) are generated and held against those of a file. Started again
after a kill it asks the model for no task's answer and no response twice.
"""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any

from salt_jax.cli.verb import Verb
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.evaluation.examination import Examination, Examinee
from salt_jax.evaluation.held_out import HeldOut
from salt_jax.evaluation.responses import Responding, Responses
from salt_jax.storage.run_folder import RunFolder
from salt_jax.storage.user_folders import cache_folder
from salt_jax.training import compilation
from salt_jax.training.checkpoints import find_model
from salt_jax.training.config import Devices

# It may be one of several processes.

# What changes no result, but for rounding, when the command is given again.
CHANGES_NO_RESULT = (
    *("evaluate.devices", "Devices", "MeshConfig"),
    *("evaluate.batch_size", "evaluate.chunk_tokens", "evaluate.save_samples"),
)


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
    task_data: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    prepend_start: bool = True,
    parse_special: bool = True,
    save_samples: bool = False,
    allow_code_execution: bool = False,
    seed: int = 0,
    list_tasks: bool = False,
    batch_size: int = 64,
    devices: Devices = Devices(),
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
) -> None:
    """Evaluates a checkpoint on held-out rows, on few-shot tasks and by its responses.

    Args:
      run: The folder for the results.
      model: The run folder of the model.
      cache: A packed cache with the model's vocabulary.
      responses: @responses.Responses(): prompts, and how to judge what the model makes of them
        (--gin_file=data/responses.gin). Writes responses.jsonl.
      step: The checkpoint; the newest by default.
      split: Of the cache, "test" or "validation".
      rows: Rows of it to read, from the first on; all by default.
      tasks: Names of tasks or groups; the flag may be given again.
      task_folder: A folder of YAML files of more tasks, which can run any code: one you trust.
      task_data: A folder of files in the place of tasks' data sets: TASK/SPLIT.jsonl, or .parquet.
      shots: Examples in a prompt, but for tasks that are meant to have none; each task's own number
        by default.
      limit: Documents of each task, the first ones; all by default.
      max_new_tokens: The most tokens of a task's answer, where it asks for more.
      prepend_start: Whether the vocabulary's start comes before every text of a task; False for
        models that were trained without one, such as Pythia.
      parse_special: Whether the name of a special token ("<|im_start|>") in a task's text or in a
        prompt stands for that token, as for lm-eval's own backend; otherwise it is plain text.
      save_samples: Write samples_TASK.jsonl: what was asked and answered.
      allow_code_execution: Execute the programs that a model writes, in tasks that score them so;
        otherwise such tasks are only generated for.
      seed: Of tasks that draw tokens by lot.
      list_tasks: Print the tasks of salt_suite, or of `tasks`, with their data sets; nothing else.
      batch_size: Rows, sequences of tasks or prompts at once.
      devices: The mesh, and where compiled programs are kept.
      chunk_tokens: Tokens whose logits a device holds at once.

    Raises:
      InputError: No such model, cache, split, task or data set, another vocabulary, bad examples.
    """
    if list_tasks:
        _few_shot().print_tasks(tasks, task_folder)
        return
    if model is None:
        raise InputError("model is not set: add --model=VALUE.")
    packed = PackedCache.open(cache) if cache is not None else None
    if run.processes.count > 1 and (tasks or responses is not None):
        raise InputError(
            f"--tasks and responses run in one process, and this is one of {run.processes.count}: "
            "leave them out, or run them on the devices of one machine."
        )
    saved = find_model(model, step, "model", packed)
    examinee = Examinee(saved, devices.mesh.make(), devices.rules, batch_size, chunk_tokens)
    examinations: list[Examination] = []
    if responses is not None and not parse_special:
        examples = responses.examples.as_plain_text()
        responses = dataclasses.replace(responses, examples=examples)
    if packed is not None:
        examinations.append(HeldOut(examinee, packed, split, rows))
    if responses is not None:
        examinations.append(Responding(examinee, responses))
    if not tasks:
        for_tasks: dict[str, Any] = {"shots": shots, "limit": limit, "task_data": task_data}
        for_tasks |= {"max_new_tokens": max_new_tokens, "task_folder": task_folder}
        for name in [name for name, value in for_tasks.items() if value is not None]:
            raise InputError(f"{name} is for few-shot tasks: add --tasks=NAME, or leave it unset.")
    else:
        few_shot = _few_shot().FewShot(
            examinee,
            tasks,
            task_folder=task_folder,
            task_data=task_data,
            shots=shots,
            limit=limit,
            max_new_tokens=max_new_tokens,
            prepend_start=prepend_start,
            save_samples=save_samples,
            allow_code_execution=allow_code_execution,
            seed=seed,
            parse_special=parse_special,
        )
        examinations.append(few_shot)
    if not examinations:
        raise InputError(
            "There is nothing to evaluate on: add --cache=FOLDER, --tasks=NAME, "
            "--gin_file=data/responses.gin, or several of them."
        )
    run.begin(may_change=CHANGES_NO_RESULT)
    compilation.use_compilation_cache(devices.compilation_cache)
    params = saved.load_params(examinee.mesh, devices.rules)
    summary: dict[str, Any] = {"model": saved.identity}
    for examination in examinations:
        summary |= examination(params, run.path)
    run.write_summary(summary)


def _few_shot() -> Any:
    """salt_jax.evaluation.few_shot, for which lm-eval must be installed."""
    if not os.environ.keys() & {"HF_HOME", "XDG_CACHE_HOME"}:  # read when it is imported
        os.environ["HF_HOME"] = str(cache_folder("huggingface", "HF_HOME"))
    try:
        return importlib.import_module("salt_jax.evaluation.few_shot")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("salt_jax"):
            raise
        raise InputError(
            f"--tasks needs the library {error.name}, which is not installed: "
            "pip install 'salt_jax[eval]'."
        ) from error


VERB = Verb(
    evaluate,
    print_flag="list_tasks",
    several_processes=True,
    changes_no_result=CHANGES_NO_RESULT,
)
