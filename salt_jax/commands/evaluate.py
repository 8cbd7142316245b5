"""`salt evaluate`: held-out rows, few-shot tasks of lm-eval, and a model's responses to prompts.

    salt evaluate --model=out/salt --cache=out/cache --output_dir=out/test
    salt evaluate --model=out/salt --compare=out/baseline --cache=out/cache --output_dir=out/paired
    salt evaluate --model=out/salt --tasks=gsm8k --tasks=ai2_arc --shots=5 --output_dir=out/few_shot
    salt evaluate --model=out/salt --tasks=salt_suite --output_dir=out/suite
    salt evaluate --model=out/tuned --gin_file=data/responses.gin … --output_dir=out/answers
    salt evaluate --list_tasks=True

There are three kinds of evaluation, which can be combined in one run. Held-out rows (--cache) give
log-perplexity, bits per byte and next-token accuracy, in total and by subset; --compare=RUN adds
the difference to another model on the same tokens, with 95% intervals by bootstrap over documents,
by subset and by position in the row, and --slm=RUN by how hard that model finds a token. Tasks are
those of lm-evaluation-harness or of a folder of YAML files in its format; salt_suite are those of
the SALT paper. Responses (data/responses.gin) are generated and compared with a file's. A killed
evaluation resumes: no task's answer and no response is computed twice.
"""

import dataclasses
from typing import Any

from salt_jax.cli.verb import Verb
from salt_jax.commands._hub_models import local_model
from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.evaluation.examination import Examination, Examinee
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.evaluation.held_out import HeldOut
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import compilation
from salt_jax.training.checkpoints import find_model
from salt_jax.training.config import Devices

# Settings that change no result, except by rounding, when the command is given again.
CHANGES_NO_RESULT = (
    *("evaluate.devices", "Devices", "MeshConfig"),
    *("evaluate.batch_size", "evaluate.chunk_tokens", "FewShot.save_samples"),
)


def evaluate(
    run: RunFolder,
    *,
    model: str | None = None,
    step: int | None = None,
    held_out: HeldOut = HeldOut(),
    few_shot: FewShot = FewShot(),
    responses: Examination | None = None,
    parse_special: bool = True,
    list_tasks: bool = False,
    batch_size: int = 64,
    chunk_tokens: int = losses.LossConfig.chunk_tokens,
    devices: Devices = Devices(),
) -> None:
    """Evaluates a checkpoint on held-out rows, on few-shot tasks and by its responses.

    Args:
      run: The folder for the results.
      model: The run folder of the model.
      step: The checkpoint; the newest by default.
      held_out: Rows of a cache.
      few_shot: Tasks of lm-eval.
      responses: @responses.Responses(): prompts, and how to judge the model's responses
        (--gin_file=data/responses.gin), or an examination of your own.
      parse_special: Whether the name of a special token ("<|im_start|>") in a task's text or in a
        prompt stands for that token, as in lm-eval's own backend; otherwise it is plain text.
      list_tasks: Only print the tasks of salt_suite, or of --tasks, with their data sets.
      batch_size: Rows, sequences of tasks or prompts at once.
      chunk_tokens: Tokens whose logits a device holds at once.
      devices: The mesh, and where compiled programs are kept.

    Raises:
      InputError: The model, cache, split, task or data set doesn't exist, vocabularies differ, or
        examples are malformed.
    """
    if list_tasks:
        few_shot.print_tasks()
        return
    if model is None:
        raise InputError("model is not set: add --model=VALUE.")
    if held_out.compare is not None:
        held_out = dataclasses.replace(held_out, compare=local_model(held_out.compare))
    if held_out.slm is not None:
        held_out = dataclasses.replace(held_out, slm=local_model(held_out.slm))
    asked: list[Examination] = [held_out] if held_out.cache is not None else []
    asked += [responses] if responses is not None else []
    asked += [few_shot] if few_shot.is_asked else []
    if not asked:
        raise InputError(
            "There is nothing to evaluate on: add --cache=FOLDER, --tasks=NAME, "
            "--gin_file=data/responses.gin, or several of them."
        )
    if run.processes.count > 1 and asked != [held_out]:
        raise InputError(
            f"--tasks and responses run in one process, and this is one of {run.processes.count}: "
            "leave them out, or run them on the devices of one machine."
        )
    saved = find_model(local_model(model), step, "model")
    mesh = devices.mesh.make()
    examinee = Examinee(saved, mesh, devices.rules, batch_size, chunk_tokens, parse_special)
    examine = [examination.prepare(examinee) for examination in asked]
    run.begin(may_change=CHANGES_NO_RESULT)
    compilation.use_compilation_cache(devices.compilation_cache)
    summary: dict[str, Any] = {"model": saved.identity}
    for each in examine:
        summary |= each(run.path)
    run.write_summary(summary)


VERB = Verb(
    evaluate,
    print_flag="list_tasks",
    several_processes=True,
    changes_no_result=CHANGES_NO_RESULT,
)
