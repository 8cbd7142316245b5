"""`salt plan`: whether both stages of a run fit a slice, and how long they take, before paying.

Takes the gin files and flags of `salt train`, compiles the two programs that it would run, for TPU
slices that need not be there (libtpu does it: `pip install 'salt_jax[plan]'`) or for the devices at
hand, and says what a chip's memory holds at its peak, what a step computes and sends, and an
estimate of the days and chip-hours of the run with and without its teacher. Where a stage does not
fit, it tries what would make it fit. Neither cache nor teacher needs to exist.

  salt plan --gin_file=paper/llm_2_8b_salt.gin --topology=v5e:16x16 --topology=v4:4x4x8 \\
      --output_dir=PLAN

A topology is local (the devices at hand), v5e:16x16, v6e:16x16, v4:4x4x8 or v5p:4x4x8 in any of
their sizes; v5e:16x16*2 is two slices. docs/planning.md says how far the numbers go.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.data import denoisers
from salt_jax.data.label_format import ENCODINGS, LabelFormat
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.errors import InputError, require_counts
from salt_jax.models.attention import require_bidirectional
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning import buffers, changes, estimate, hlo, table, topologies
from salt_jax.planning.compile import (
    CompiledStage,
    Job,
    TooLarge,
    check_batch,
    compile_stage,
    in_gib,
)
from salt_jax.planning.stored_labels import (
    label_sizes,
    read_sentence,
    sentence,
    stored_labels,
)
from salt_jax.storage.local_copies import local_folder
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import say
from salt_jax.training.config import FROM_FILES, Teacher, TrainConfig

__all__ = ["FROM_FILES", "plan"]

# What a run needs and a plan does not: what they name need not be there. None but for KEEP_STEPS.
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
    """Compiles the stages of a run for one topology or many; `salt train`'s settings hold here too.

    Args:
      run: The folder for summary.json.
      config: The run's settings. A cache that they name gives vocab_size and sequence_length.
      topology: What to compile for; repeat the flag for more than one.
      teacher_model: The teacher, or a gin file of gin/models; computes as the student does.
      vocab_size: Ids of the vocabulary, for models that don't set it.
      sequence_length: L, tokens of a row.
      hbm_gib: Memory of a chip, GiB, instead of what is known of it.
      try_changes: Whether to look for settings that make a stage fit.
      stored_ids: Ids a token of stored soft labels, to say what storing them would take; also of
        config's soft labels where they are not there yet.

    Raises:
      InputError: Settings that don't fit each other, an unknown topology, or libtpu is missing;
        or the run fits no topology, which summary.json then says in full.
    """
    data, method, devices = config.data, config.method, config.devices
    if data.cache is not None:
        packed = PackedCache.open(data.cache if isinstance(data.cache, str) else data.cache[0])
        vocab_size, sequence_length = packed.vocabulary_size, packed.sequence_length
    require_counts(sequence_length=sequence_length, stored_ids=stored_ids)
    if config.model is None:
        raise InputError(
            "model is not set: add a gin file that sets it (--gin_file=models/llm_2_8b.gin, say)."
        )
    taught = method.teacher or Teacher(path=None)
    if config.stage1_steps and teacher_model is None and method.soft_labels is None:
        raise InputError(
            f"The schedule {type(method.schedule).__name__} has a stage 1 of {config.stage1_steps} "
            "steps and no teacher_model is set: add --teacher_model=models/slm_1_5b.gin, or "
            "another model file, or --soft_labels=FOLDER."
        )
    if data.cache is not None and config.model.vocab_size not in (None, vocab_size):
        raise InputError(
            f"DecoderConfig.vocab_size is {config.model.vocab_size} and the vocabulary of the "
            f"cache has {vocab_size} ids: leave vocab_size unset."
        )
    student = _with_vocabulary(config.model, vocab_size)
    stored_k = _stored_k(config, stored_ids) if config.stage1_steps else 0
    job = Job(
        model=student,
        teacher=_teacher(teacher_model, student)
        if config.stage1_steps and teacher_model and not stored_k
        else None,
        teacher_dtype=taught.dtype,
        optimizer=config.optimizer,
        loss=method.loss,
        steps=config.steps,
        stage1_steps=config.stage1_steps,
        batch_size=data.batch_size,
        sequence_length=sequence_length,
        microbatches=devices.microbatches_of(2),
        stage1_microbatches=devices.microbatches_of(1),
        mesh=devices.mesh,
        rules=devices.rules,
        teacher_rules=taught.rules,
        soft_labels=stored_k,
        extra_features=_features(data.objectives, taught.objectives, student),
    )
    if sequence_length > student.max_length:
        raise InputError(
            f"sequence_length is {sequence_length} and the student's DecoderConfig.max_length is "
            f"{student.max_length}: plan for shorter rows (--sequence_length={student.max_length}, "
            "or --cache=FOLDER for those of a cache), or raise max_length."
        )
    if hbm_gib is not None and hbm_gib <= 0:
        raise InputError(f"hbm_gib is {hbm_gib} and must be above 0: change --hbm_gib.")
    found = [topologies.find(name, hbm_gib) for name in topology]
    if job.has_stage1:
        LabelFormat(sequence_length, student.vocab_size or 0, stored_k or stored_ids)  # or refused
    for where in found:
        for stage in _stages(job):
            check_batch(job, where, stage)
    run.begin(replace=True)
    say(f"[{method.arm}] {_describe(job)}")
    plans = [_plan(job, where, try_changes, stored_ids) for where in found]
    table.print_plans(plans)
    run.write_summary(_summary(job, method.arm, plans))
    _refuse_if_none_fits(plans)


def _stored_k(config: TrainConfig, stored_ids: int) -> int:
    """Ids a token of the labels that stand for a teacher; 0 without such labels."""
    folder = config.method.soft_labels
    if folder is None:
        return 0
    if config.data.objectives is not None:
        raise InputError(
            f"The soft labels {folder} are of rows as they are, and objectives changes rows: "
            "leave it unset, or plan with a teacher_model instead."
        )
    if not local_folder(folder).exists():
        return stored_ids
    return StoredLabels.open(folder).format.k


def _features(
    objectives: denoisers.Objectives | None, teacher_objectives: str, model: DecoderConfig
) -> tuple[str, ...]:
    """What batches hold for the objectives."""
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


def _plan(
    job: Job, topology: topologies.Topology, try_changes: bool, stored_ids: int
) -> dict[str, Any]:
    """The plan of a run on one topology, as summary.json has it."""
    chips = len(topology.devices)
    compiled = {stage: _compile(job, topology, stage) for stage in _stages(job)}
    stages = [_stage(job, topology, stage, compiled[stage]) for stage in compiled]
    if try_changes and any(stage["fits"] is False for stage in stages):
        _add_change(job, topology, compiled, stages)
    seconds = {s["stage"]: (s["change"] or s).get("step_seconds_estimate") for s in stages}
    total = estimate.estimate_run(job, chips, seconds.get(1), seconds[2])
    stored = stored_labels(job, stored_ids, chips, seconds.get(1), seconds[2], ENCODINGS)
    read = label_sizes(job, job.soft_labels, seconds.get(1), ENCODINGS) if job.soft_labels else None
    return {
        "topology": topology.name,
        "chips": chips,
        "device_kind": topology.chip.kind,
        "hbm_gib": topology.chip.hbm_gib,
        "mesh": dict(job.mesh.make(topology.devices).shape),
        "stages": stages,
        "run": {
            "steps": job.steps,
            "stage1_steps": job.stage1_steps,
            "flops": total.flops,
            "baseline_flops": total.baseline_flops,
            "days": _days(total.seconds),
            "baseline_days": _days(total.baseline_seconds),
            "chip_hours": total.chip_hours(total.seconds),
            "baseline_chip_hours": total.chip_hours(total.baseline_seconds),
            "teacher_overhead": total.overhead,
        },
        "stored_labels": stored and {**dataclasses.asdict(stored), "advice": sentence(stored)},
        "read_labels": read and {**dataclasses.asdict(read), "advice": read_sentence(read)},
    }


def _stages(job: Job) -> tuple[int, ...]:
    return (1, 2) if job.has_stage1 else (2,)


def _compile(job: Job, topology: topologies.Topology, stage: int) -> CompiledStage | TooLarge:
    say(f"compiling stage {stage} for {topology.name} …")
    return compile_stage(job, topology, stage)


def _stage(
    job: Job, topology: topologies.Topology, stage: int, compiled: CompiledStage | TooLarge
) -> dict[str, Any]:
    """A stage of a plan with the settings as they were given."""
    return {
        "stage": stage,
        "microbatches": job.microbatches_of(stage),
        "fits": changes.fits(compiled, topology),
        "flops_per_step": estimate.flops_per_step(job, stage),
        "change": None,
        "tried": [],
        **_measures(job, topology, stage, compiled),
    }


def _add_change(
    job: Job,
    topology: topologies.Topology,
    compiled: Mapping[int, CompiledStage | TooLarge],
    stages: Sequence[dict[str, Any]],
) -> None:
    """Looks for settings with which all stages fit, and adds to each stage what it is with them."""
    by_number = {stage["stage"]: stage for stage in stages}
    for number, stage in by_number.items():
        if not stage["fits"]:
            say(f"  stage {number} does not fit: {_size_text(compiled[number])}")

    def tried(number: int, change: changes.Change, outcome: CompiledStage | TooLarge) -> None:
        by_number[number]["tried"].append({"settings": change.settings, **_size(outcome)})
        say(f"  stage {number} with {change.flags}: {_size_text(outcome)}")

    fit = changes.find_change(job, topology, compiled, compile_stage, tried)
    if fit is None:
        return
    for number, stage in by_number.items():
        stage["change"] = {
            "settings": fit.change.settings,
            "flags": fit.change.flags,
            **_measures(fit.change.job, topology, number, fit.stages[number]),
        }


def _measures(
    job: Job, topology: topologies.Topology, stage: int, compiled: CompiledStage | TooLarge
) -> dict[str, Any]:
    if isinstance(compiled, TooLarge):
        return {**_size(compiled), "compile_seconds": compiled.seconds}
    chips = len(topology.devices)
    module = hlo.parse(compiled.hlo)
    cost = estimate.estimate_stage(job, stage, topology.chip, chips, module)
    seconds, peak = cost.step_seconds, topology.chip.peak_flops
    return {
        **_size(compiled),
        "breakdown_gib": in_gib(compiled.parts),
        "compile_seconds": compiled.seconds,
        "hardware_flops_per_step": cost.hardware_flops,
        "memory_bytes_per_step": cost.memory_bytes,
        "collective_bytes_per_step": dict(cost.collective_bytes),
        "step_seconds_estimate": seconds,
        "roofline_seconds": None if cost.seconds is None else dict(cost.seconds),
        "tokens_per_second_estimate": job.tokens / seconds if seconds else None,
        "largest_temporaries": [buffer._asdict() for buffer in buffers.largest(module, 8)],
        "mfu_estimate": cost.flops / (seconds * chips * peak) if seconds and peak else None,
    }


def _size(compiled: CompiledStage | TooLarge) -> dict[str, Any]:
    if isinstance(compiled, TooLarge):
        return {"peak_hbm_gib": None, "needed_gib": compiled.needed_gib}
    memory = compiled.memory
    sizes = {
        name: getattr(memory, name)
        for name in ("arguments", "temporaries", "outputs", "aliased", "bound")
    }
    gib = memory.peak / topologies.GIB
    return {"peak_hbm_gib": gib, "needed_gib": gib, "memory_analysis_gib": in_gib(sizes)}


def _size_text(compiled: CompiledStage | TooLarge) -> str:
    gib = _size(compiled)["needed_gib"]
    return "too large" if gib is None else f"{gib:.2f} GiB"


def _with_vocabulary(model: DecoderConfig, vocab_size: int) -> DecoderConfig:
    if model.vocab_size is not None:
        return model
    return dataclasses.replace(model, vocab_size=vocab_size)


def _teacher(model: DecoderConfig, student: DecoderConfig) -> DecoderConfig:
    """The teacher: trained as the student is, so it computes in its dtype, by its attention."""
    return dataclasses.replace(
        model,
        vocab_size=student.vocab_size,
        max_length=max(model.max_length, student.max_length),
        dtype=student.dtype,
        attention_backend=student.attention_backend,
    )


def _describe(job: Job) -> str:
    text = (
        f"{job.model.num_parameters:,} parameters, {job.steps:,} steps of {job.batch_size:,} × "
        f"{job.sequence_length:,} tokens"
    )
    if job.soft_labels:
        stored = f"stored soft labels of {job.soft_labels} ids a token"
        return f"{text}, {job.stage1_steps:,} of them with {stored}"
    if job.teacher is None:
        return f"{text}, no teacher"
    return (
        f"{text}, {job.stage1_steps:,} of them with a teacher of {job.teacher.num_parameters:,} "
        "parameters"
    )


def _summary(job: Job, arm: str, plans: list[dict[str, Any]]) -> Mapping[str, Any]:
    return {
        "arm": arm,
        "parameters": job.model.num_parameters,
        "teacher_parameters": job.teacher.num_parameters if job.teacher else None,
        "tokens_per_step": job.tokens,
        "assumptions": {
            "compute_fraction_of_peak": estimate.COMPUTE_FRACTION,
            "memory_fraction_of_peak": estimate.MEMORY_FRACTION,
            "link_fraction_of_peak": estimate.LINK_FRACTION,
        },
        "plans": plans,
    }


def _days(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 86_400
