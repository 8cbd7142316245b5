"""`salt plan`: whether a run fits a slice, and how long it takes, before paying for it.

Takes the gin files and flags of `salt train` and compiles the programs of both stages, for TPU
slices without having one (by libtpu: `pip install 'salt_jax[plan]'`) or for the devices at hand. It
prints a chip's peak memory, a step's computation and communication, and an estimate of the days and
chip-hours of the run with and without its teacher. If a stage does not fit, it tries settings that
make it fit; if memory is idle, settings that use it. Neither the cache nor the teacher needs to
exist.

  salt plan --gin_file=paper/llm_2_8b_salt.gin --topology=v5e:16x16 --topology=v4:4x4x8 \\
      --output_dir=PLAN

A topology is local (the devices at hand), v5e:16x16, v6e:16x16, v4:4x4x8 or v5p:4x4x8 in any of
their sizes; v5e:16x16*2 is two slices; h100:8 and h200:1 are GPUs (`pip install
'salt_jax[plan_gpu]'`). docs/planning.md says how accurate the numbers are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.cli.verb import Verb
from salt_jax.data import denoisers
from salt_jax.data.label_format import LabelFormat
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.errors import InputError, require_counts
from salt_jax.models.attention import require_bidirectional
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning import estimate, plan_table, topologies
from salt_jax.planning.compile import Job, check_batch
from salt_jax.planning.run_plan import plan_run
from salt_jax.storage.local_copies import exists
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import say
from salt_jax.training.config import FROM_FILES, Teacher, TrainConfig

# Placeholder values of settings that a run needs and a plan does not.
NEEDS_NO = {
    "Data.cache": None,
    "Data.selection": None,
    "Initial.path": None,
    "Teacher.path": None,
    "CheckpointConfig.keep_steps": (),
}


def plan(
    run: RunFolder,
    *,
    config: TrainConfig,
    topology: Sequence[str] = (topologies.LOCAL,),
    teacher_model: DecoderConfig | None = None,
    vocab_size: int = 256_000,
    sequence_length: int = 1280,
    hbm_gib: float | None = None,
    try_changes: bool = True,
    stored_ids: int = 64,
) -> None:
    """Compiles the stages of a run for one topology or more, with the settings of `salt train`.

    Args:
      run: The folder for summary.json.
      config: The run's settings. Their cache, if any, gives vocab_size and sequence_length.
      topology: What to compile for; repeat the flag for more than one.
      teacher_model: The teacher, or a gin file of gin/models; it computes in the student's dtype.
      vocab_size: Ids of the vocabulary, for models that don't set it.
      sequence_length: L, tokens of a row.
      hbm_gib: Memory of a chip, GiB, in place of the known value.
      try_changes: Whether to look for settings that make a stage fit, or that use idle memory.
      stored_ids: Ids per token of stored soft labels, to estimate their size; also of the run's
        soft labels if their folder doesn't exist yet.

    Raises:
      InputError: Settings are incompatible, a topology is unknown, libtpu is missing, or the run
        fits none of the topologies (summary.json is still written).
    """
    if config.data.cache is not None:
        cache = config.data.cache
        packed = PackedCache.open(cache if isinstance(cache, str) else cache[0])
        vocab_size, sequence_length = packed.vocabulary_size, packed.sequence_length
    require_counts(sequence_length=sequence_length, stored_ids=stored_ids)
    if hbm_gib is not None and hbm_gib <= 0:
        raise InputError(f"hbm_gib is {hbm_gib} and must be above 0: change --hbm_gib.")
    job = _job(config, teacher_model, vocab_size, sequence_length, stored_ids)
    found = [topologies.find(name, hbm_gib) for name in topology]
    if 1 in job.stages:  # otherwise the size of soft labels would be refused
        LabelFormat(sequence_length, job.student.vocab_size or 0, job.soft_labels or stored_ids)
    for where in found:
        for stage in job.stages:
            check_batch(job, where, stage)
    run.begin(replace=True)
    say(f"[{config.method.arm}] {_describe(job)}")
    plans = [
        plan_run(job, where, try_changes=try_changes, stored_ids=stored_ids) for where in found
    ]
    plan_table.print_plans(plans)
    run.write_summary(
        {
            "arm": config.method.arm,
            "parameters": job.student.num_parameters,
            "teacher_parameters": job.teacher.num_parameters if job.teacher else None,
            "tokens_per_step": job.tokens,
            "assumptions": {
                "compute_fraction_of_peak": estimate.COMPUTE_FRACTION,
                "memory_fraction_of_peak": estimate.MEMORY_FRACTION,
                "link_fraction_of_peak": estimate.LINK_FRACTION,
            },
            "plans": plans,
        }
    )
    _refuse_if_none_fits(plans)


def _job(
    config: TrainConfig,
    teacher_model: DecoderConfig | None,
    vocab_size: int,
    sequence_length: int,
    stored_ids: int,
) -> Job:
    """The job to compile; InputError if the run's settings are incompatible."""
    method, taught = config.method, config.method.teacher or Teacher(path=None)
    student = _student(config, vocab_size)
    if sequence_length > student.max_length:
        raise InputError(
            f"sequence_length is {sequence_length} and the student's DecoderConfig.max_length is "
            f"{student.max_length}: plan for shorter rows (--sequence_length={student.max_length}, "
            "or --cache=FOLDER for those of a cache), or raise max_length."
        )
    if config.stage1_steps and teacher_model is None and method.soft_labels is None:
        raise InputError(
            f"The schedule {type(method.schedule).__name__} has a stage 1 of {config.stage1_steps} "
            "steps and no teacher_model is set: add --teacher_model=models/slm_1_5b.gin, or "
            "another model file, or --soft_labels=FOLDER."
        )
    labels = _stored_k(config, stored_ids) if config.stage1_steps else 0
    teacher = None
    if config.stage1_steps and teacher_model and not labels:
        teacher = _teacher(teacher_model, student)
    return Job(
        config=dataclasses.replace(config, model=student),
        teacher=teacher,
        sequence_length=sequence_length,
        soft_labels=labels,
        extra_features=_features(config.data.objectives, taught.objectives, student),
    )


def _stored_k(config: TrainConfig, stored_ids: int) -> int:
    """Ids per token of the soft labels that replace the teacher; 0 without soft labels."""
    folder = config.method.soft_labels
    if folder is None:
        return 0
    if config.data.objectives is not None:
        raise InputError(
            f"The soft labels {folder} are of unchanged rows, and objectives changes rows: "
            "leave it unset, or plan with a teacher_model instead."
        )
    if not exists(folder):
        return stored_ids
    return StoredLabels.open(folder).format.k


def _features(
    objectives: denoisers.Objectives | None, teacher_objectives: str, model: DecoderConfig
) -> tuple[str, ...]:
    """The extra features of batches for the run's objectives (train_step.EXTRA_FEATURES)."""
    if objectives is None:
        return ()
    if objectives.bidirectional_prefix:
        require_bidirectional(model.attention_backend)
    return denoisers.feature_names(objectives, teacher_objectives)


def _refuse_if_none_fits(plans: Sequence[Mapping[str, Any]]) -> None:
    lacking = [
        next((stage for stage in plan["stages"] if stage["fits"] is False), None)
        for plan in plans
        if plan["stages"][0]["change"] is None
    ]
    if len(lacking) < len(plans) or None in lacking:
        return
    plan, stage = plans[0], lacking[0]
    assert stage is not None, "every plan lacks memory"
    tried = sum(len(each["tried"]) for each in plan["stages"])
    needed, has = (
        "an unknown amount" if gib is None else f"{gib:.2f} GiB"
        for gib in (stage["needed_gib"], plan["hbm_gib"])
    )
    raise InputError(
        f"The run does not fit {', '.join(plan['topology'] for plan in plans)}: stage "
        f"{stage['stage']} needs {needed} on a device of {plan['topology']}, which has {has}"
        + (f", and none of the {tried} changes tried makes it fit" if tried else "")
        + ": plan for more devices (--topology), or for a smaller model."
    )


def _student(config: TrainConfig, vocab_size: int) -> DecoderConfig:
    """The student, its vocab_size set."""
    if config.model is None:
        raise InputError(
            "model is not set: add a gin file that sets it (--gin_file=models/llm_2_8b.gin, say)."
        )
    if config.data.cache is not None and config.model.vocab_size not in (None, vocab_size):
        raise InputError(
            f"DecoderConfig.vocab_size is {config.model.vocab_size} and the vocabulary of the "
            f"cache has {vocab_size} ids: leave vocab_size unset."
        )
    if config.model.vocab_size is not None:
        return config.model
    return dataclasses.replace(config.model, vocab_size=vocab_size)


def _teacher(model: DecoderConfig, student: DecoderConfig) -> DecoderConfig:
    """The teacher, with the student's dtype and attention backend."""
    return dataclasses.replace(
        model,
        vocab_size=student.vocab_size,
        max_length=max(model.max_length, student.max_length),
        dtype=student.dtype,
        attention_backend=student.attention_backend,
    )


def _describe(job: Job) -> str:
    config = job.config
    text = (
        f"{job.student.num_parameters:,} parameters, {config.steps:,} steps of "
        f"{config.data.batch_size:,} × {job.sequence_length:,} tokens"
    )
    if job.soft_labels:
        taught = f"stored soft labels of {job.soft_labels} ids a token"
    elif job.teacher is not None:
        taught = f"a teacher of {job.teacher.num_parameters:,} parameters"
    else:
        return f"{text}, no teacher"
    return f"{text}, {config.stage1_steps:,} of them with {taught}"


VERB = Verb(plan, gin_files=FROM_FILES, not_needed=NEEDS_NO)
