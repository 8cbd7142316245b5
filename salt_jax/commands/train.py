"""`salt train`: trains a model, as baseline or with a teacher (RKD, SALT, SALT_DS).

Compose gin files: a model (gin/models), a method (gin/methods), hardware (gin/hardware), or take
a whole run (gin/runs). A run that was stopped goes on when the same command is given again.
"""

import dataclasses
from collections.abc import Sequence

import jax

from salt_jax.data import denoisers
from salt_jax.data.input_pipeline import SELECTED, Position
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.vocabularies import VOCABULARY_FOLDER
from salt_jax.distill import losses, schedules
from salt_jax.errors import InputError, require_counts
from salt_jax.models.attention import require_bidirectional
from salt_jax.models.decoder import DecoderConfig
from salt_jax.run_folder import RunFolder
from salt_jax.training import compilation, partitioning
from salt_jax.training.caches import Caches, make_pipeline
from salt_jax.training.checkpoints import (
    CheckpointConfig,
    SavedModel,
    complete_steps,
    find_model,
    read_progress,
    state_bytes,
)
from salt_jax.training.evaluation import Evaluator, MixtureEvaluator
from salt_jax.training.loop import Loop, TrainingSetup
from salt_jax.training.optimizers import Optimizer, make_transformation
from salt_jax.training.origin import origin_of, scoring_cost
from salt_jax.training.teacher import find_labels, find_teacher, refuse_unused
from salt_jax.training.train_state import StateLayout, make_layout

# What sets the settings that no flag can.
FROM_FILES = {
    "optimizer": "runs/pretrain.gin",
    "schedule": "methods/baseline.gin",
    "loss": "methods/baseline.gin",
}

# It may be one of several processes, and asks whether one of them was asked to stop.
SEVERAL_PROCESSES = SAVES_ON_REQUEST = True

# What may change when a run goes on: how it is computed and when it is told of, and the batch size,
# since positions count rows.
MAY_CHANGE = (
    *("train.batch_size", "train.microbatches", "train.stage1_microbatches", "train.read_threads"),
    *("train.mesh", "MeshConfig", "train.rules", "train.teacher_rules"),
    *("DecoderConfig.remat", "DecoderConfig.attention_backend", "LossConfig.chunk_tokens"),
    *("train.checkpoints", "CheckpointConfig", "train.evaluate_every", "train.log_every"),
    *("train.max_skipped_updates", "train.hang_seconds", "train.compilation_cache"),
    # Folders may be moved: what is in them is compared by digests.
    *("train.cache", "train.teacher", "train.selection", "train.soft_labels"),
)


def train(
    run: RunFolder,
    *,
    model: DecoderConfig | None = None,
    cache: str | Sequence[str],
    steps: int,
    batch_size: int,
    optimizer: Optimizer,
    schedule: schedules.Schedule,
    loss: losses.LossConfig,
    arm: str,
    seed: int = 0,
    data_seed: int = 0,
    teacher: str | None = None,
    teacher_step: int | None = None,
    teacher_dtype: str | None = None,
    soft_labels: str | None = None,
    selection: str | None = None,
    selection_steps: int | None = None,
    stage2_rows: str = "all",
    cache_weights: Sequence[float] | None = None,
    objectives: denoisers.Objectives | None = None,
    teacher_objectives: str = "all",
    initial: str | None = None,
    initial_step: int | None = None,
    mesh: partitioning.MeshConfig = partitioning.MeshConfig(),  # noqa: B008 (frozen)
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    teacher_rules: partitioning.Rules | None = None,
    microbatches: int = 1,
    stage1_microbatches: int | None = None,
    checkpoints: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (frozen)
    evaluate_every: int = 1000,
    evaluation_rows: int | None = None,
    log_every: int = 10,
    read_threads: int = 2,
    max_skipped_updates: int = 10,
    hang_seconds: float = 600.0,
    compilation_cache: str = compilation.DEFAULT_FOLDER,
) -> None:
    """Trains a model on a packed cache, with or without a teacher.

    Args:
      run: The folder for checkpoints, metrics and results.
      model: The student, the initial model's shape by default; its vocab_size is the cache's where
        it is not set.
      cache: A folder made by `salt prepare`; several are mixed (repeat the flag).
      steps: Updates of the whole run.
      batch_size: B, rows of the global batch; may change when a run goes on.
      optimizer: The optimizer and its learning rate.
      schedule: ω by step: which steps have a teacher, and how much it counts.
      loss: Temperatures, divergence, z-loss.
      arm: The method's name in reports ("baseline", "salt").
      seed: Of the student's initialisation.
      data_seed: Of the order of rows; the same for all arms that are to be compared.
      teacher: A run's folder whose model teaches in stage 1.
      teacher_step: Its checkpoint; the newest by default.
      teacher_dtype: What to hold it in, "bfloat16" for one; as it was saved by default.
      soft_labels: A folder made by `salt score --soft_labels=K`, in place of a teacher.
      selection: A folder made by `salt select`: stage 1 reads its rows alone (SALT_DS).
      selection_steps: How many steps read the selection; stage 1's by default. Set it to read
        selected rows without a teacher.
      stage2_rows: "all", or "unused": stage 2 leaves out the rows that stage 1 read of a selection.
      cache_weights: How much of what is read is to be of each cache; by default their rows, so that
        all come to an epoch's end together. Only proportions matter.
      objectives: What rows are trained on: UL2's mixture, for one; None is next tokens alone.
      teacher_objectives: "causal" for a teacher that was trained on next tokens alone: its ω is 0
        on other rows. "all" lets it teach them all.
      initial: A run's folder to start the student from, instead of from the seed.
      initial_step: Its checkpoint; the newest by default.
      mesh: How many devices along each mesh axis.
      rules: From the model's logical axes to the mesh's.
      teacher_rules: The same for the teacher's parameters, which have no gradients and no optimizer
        state and so may fit whole where the student's don't; rules by default.
      microbatches: Parts of a batch computed one after the other, to save memory.
      stage1_microbatches: The same in stage 1, where the teacher needs room; microbatches if None.
      checkpoints: When to save, what to keep.
      evaluate_every: Steps between evaluations on the validation split.
      evaluation_rows: Rows of it to read; all by default.
      log_every: Steps between lines of metrics.
      read_threads: Threads that read batches ahead.
      max_skipped_updates: Non-finite updates to skip before the run stops.
      hang_seconds: Where a step's rows, a device or a checkpoint take longer, the stacks of all
        threads are printed; 0 is never.
      compilation_cache: Where compiled programs are kept between runs; "" keeps none.

    Raises:
      InputError: Settings that don't fit each other, the cache, the teacher or the devices.
    """
    caches = Caches.open(cache, cache_weights)
    packed = caches.first
    initial_model = _initial(initial, initial_step, packed)
    config = _student(model, initial_model, packed)
    device_mesh = mesh.make()
    require_counts(steps=steps, batch_size=batch_size, evaluate_every=evaluate_every)
    require_counts(log_every=log_every, evaluation_rows=evaluation_rows, microbatches=microbatches)
    require_counts(stage1_microbatches=stage1_microbatches, selection_steps=selection_steps)
    require_counts(0, max_skipped_updates=max_skipped_updates, seed=seed, data_seed=data_seed)
    _check_keep_steps(checkpoints, steps)
    parts = _check_batch(batch_size, (microbatches, stage1_microbatches), device_mesh)
    stage1_steps = schedule.distill_steps(steps)
    start = _position(run)
    selected = _selection(selection, selection_steps, stage1_steps)
    refuse_unused(schedule, stage1_steps, selection_steps, teacher, teacher_step, soft_labels)
    # A run that goes on in stage 2 has no need of its teacher, which may be gone.
    teacher_model, labels = None, None
    if start.step < stage1_steps and soft_labels is not None:
        labels = find_labels(soft_labels, teacher, caches, selected, loss, objectives)
    elif start.step < stage1_steps:
        asked = teacher, teacher_step, teacher_dtype, packed
        teacher_model = find_teacher(*asked, schedule, loss, objectives, teacher_objectives)
    layout = make_layout(config, make_transformation(optimizer, steps, config), device_mesh, rules)
    setup = TrainingSetup(
        arm=arm,
        steps=steps,
        seed=seed,
        layout=layout,
        loss=loss,
        schedule=schedule,
        pipeline=make_pipeline(
            caches,
            partitioning.batch_part(device_mesh),
            batch_size=batch_size,
            seed=data_seed,
            selected=selected,
            stage1_steps=min(selection_steps or stage1_steps, steps),
            stage2_rows=stage2_rows,
            start=start,
            denoising=_denoising(objectives, packed, data_seed, teacher_objectives, config),
            soft_labels=labels,
            read_threads=read_threads,
        ),
        sequence_length=packed.sequence_length,
        evaluator=_evaluator(caches, layout, batch_size // max(parts), evaluation_rows, loss),
        evaluation_rows=_held_out_rows(caches, evaluation_rows),
        learning_rate=optimizer.learning_rate.schedule(steps),
        checkpoints=checkpoints,
        origin=origin_of(config, caches, schedule, selected, teacher_model, labels),
        teacher=teacher_model,
        teacher_dtype=teacher_dtype,
        teacher_rules=teacher_rules,
        scoring=scoring_cost(selected, labels, arm),
        initial=initial_model,
        microbatches=microbatches,
        stage1_microbatches=stage1_microbatches,
        evaluate_every=evaluate_every,
        log_every=log_every,
        max_skipped_updates=max_skipped_updates,
        hang_seconds=hang_seconds,
    )
    _begin(run, setup, packed)
    compilation.use_compilation_cache(compilation_cache)
    run.write_summary(Loop(setup, run).run())


def _begin(run: RunFolder, setup: TrainingSetup, cache: PackedCache) -> None:
    _require_space(run, setup.checkpoints, state_bytes(setup.layout))
    for change in run.begin(may_change=MAY_CHANGE):
        print(f"[{setup.arm}] {change}")
    if run.processes.is_first:
        cache.vocabulary.save(run.path / VOCABULARY_FOLDER)
    _describe(setup)


def _require_space(run: RunFolder, checkpoints: CheckpointConfig, state: int) -> None:
    kept = checkpoints.keep_last + len(checkpoints.keep_steps) + 1
    run.require_space(kept * state, f"{kept} checkpoints")


def _position(run: RunFolder) -> Position:
    """Where the run's newest checkpoint stands."""
    steps = complete_steps(run.path)
    if not steps:
        return Position()
    rows = read_progress(run.path, steps[-1])["rows_consumed"]
    return Position(steps[-1], rows["stage1"], rows["stage2"])


def _initial(path: str | None, step: int | None, cache: PackedCache) -> SavedModel | None:
    if path is not None:
        return find_model(path, step, "initial", cache)
    if step is not None:
        raise InputError(
            f"initial_step is {step} and initial is not set: leave it out, or add --initial=RUN."
        )
    return None


def _student(
    model: DecoderConfig | None, initial: SavedModel | None, cache: PackedCache
) -> DecoderConfig:
    if model is None:
        if initial is None:
            raise InputError(
                "model is not set, and there is no initial model whose shape it could "
                "take: add a gin file that sets it (--gin_file=models/llm_mini.gin, say), or "
                "--initial=RUN."
            )
        # A model taken in may have 16 bits, which is enough to compute with and not to update.
        model = dataclasses.replace(initial.config, param_dtype="float32")
    if model.param_dtype != "float32":
        raise InputError(
            f"DecoderConfig.param_dtype is {model.param_dtype}, and a student's parameters and "
            "moments are kept in float32: change it, and set dtype for what to compute in."
        )
    if model.vocab_size not in (None, cache.vocabulary_size):
        raise InputError(
            f"DecoderConfig.vocab_size is {model.vocab_size} and the vocabulary of the cache "
            f"{cache.path} has {cache.vocabulary_size} ids: leave vocab_size unset."
        )
    model = dataclasses.replace(model, vocab_size=cache.vocabulary_size)
    if cache.sequence_length > model.max_length:
        raise InputError(
            f"The cache {cache.path} has rows of {cache.sequence_length} tokens and "
            f"DecoderConfig.max_length is {model.max_length}: raise it, or prepare shorter rows."
        )
    if initial is not None and initial.config.shape != model.shape:
        theirs, ours = vars(initial.config.shape), vars(model.shape)
        differing = [
            f"{name} {value!r} (the student has {ours[name]!r})"
            for name, value in theirs.items()
            if value != ours[name]
        ]
        raise InputError(
            f"initial is {initial.path}, a model with {', '.join(differing)}: give the student the "
            "same shape, or leave model unset."
        )
    return model


def _check_keep_steps(checkpoints: CheckpointConfig, steps: int) -> None:
    if any(not 0 < step <= steps for step in checkpoints.keep_steps):
        raise InputError(
            f"CheckpointConfig.keep_steps is {tuple(checkpoints.keep_steps)} and the run has "
            f"{steps} steps: keep steps from 1 to {steps} (--gin.KEEP_STEPS), or raise --steps."
        )


def _check_batch(
    batch_size: int, microbatches: tuple[int, int | None], mesh: jax.sharding.Mesh
) -> tuple[int, int]:
    """The microbatches of a plain step and of one with a teacher."""
    plain, stage1 = microbatches
    divisor = partitioning.batch_divisor(mesh)
    for parts in (plain, stage1 or plain):
        if batch_size % (divisor * parts):
            raise InputError(
                f"batch_size {batch_size} can't be split over {divisor} devices in {parts} "
                "microbatches: make it a multiple of devices × microbatches, or change "
                "microbatches or the mesh."
            )
    return plain, stage1 or plain


def _selection(
    path: str | None, selection_steps: int | None, stage1_steps: int
) -> Selection | None:
    if path is None:
        if selection_steps is not None:
            raise InputError(
                f"selection_steps is {selection_steps} and there is no selection to read: add "
                "--selection=FOLDER."
            )
        return None
    selection = Selection.open(path)
    if selection_steps is None and stage1_steps == 0:
        raise InputError(
            f"selection is {path}, but the schedule has no stage 1 to read it in: leave selection "
            "unset, choose a schedule with n_kd over 0, or set selection_steps."
        )
    if selection.manifest["split"] != "train":
        raise InputError(
            f"The selection {path} is of the {selection.manifest['split']} split: select from "
            "scores of the train split."
        )
    return selection


def _denoising(
    objectives: denoisers.Objectives | None,
    cache: PackedCache,
    seed: int,
    teacher_objectives: str,
    config: DecoderConfig,
) -> denoisers.Denoising | None:
    if teacher_objectives not in denoisers.TEACHER_OBJECTIVES:
        raise InputError(f"teacher_objectives is {teacher_objectives!r}: choose 'all' or 'causal'.")
    if objectives is None:
        return None
    if objectives.bidirectional_prefix:
        require_bidirectional(config.attention_backend)
    return denoisers.Denoising(
        objectives, cache.vocabulary, cache.sequence_length, seed, teacher_objectives
    )


def _evaluator(
    caches: Caches,
    layout: StateLayout,
    batch_size: int,
    rows: int | None,
    loss: losses.LossConfig,
) -> Evaluator | MixtureEvaluator:
    """For the validation rows of every cache; causal, whatever the objectives."""
    evaluators = {
        name: Evaluator(
            layout.config,
            cache,
            "validation",
            batch_size,
            layout.mesh,
            layout.rules,
            rows,
            loss.chunk_tokens,
        )
        for name, cache in caches.packed.items()
    }
    return MixtureEvaluator(evaluators) if len(evaluators) > 1 else evaluators.popitem()[1]


def _held_out_rows(caches: Caches, rows: int | None) -> int:
    held_out = [len(cache.split("validation")) for cache in caches.packed.values()]
    return sum(min(rows or size, size) for size in held_out)


def _describe(setup: TrainingSetup) -> None:
    """Says what is about to run, and what a reader might not expect of it."""
    pipeline = setup.pipeline
    epochs = pipeline.epochs(setup.steps)
    sizes = (pipeline.unused_rows or pipeline.all_rows).sizes()
    read = [
        f"{epochs[name]:.2f} epochs of {sizes[i]:,} rows"
        + (f" of {name}" if len(sizes) > 1 else "")
        for i, name in enumerate(pipeline.sources)
    ]
    print(
        f"[{setup.arm}] {setup.layout.config.num_parameters:,} parameters, {setup.steps} steps of "
        f"{pipeline.batch_size} × {setup.sequence_length} tokens, {', '.join(read)}, "
        f"{setup.stage1_steps} steps with a teacher"
    )
    n_kd = getattr(setup.schedule, "n_kd", None)
    if n_kd is not None and n_kd > setup.steps:
        print(
            f"[{setup.arm}] n_kd {n_kd} is over the run's {setup.steps} steps: the teacher stays "
            "to the end, and there is no stage 2"
        )
    if pipeline.selected_rows is None:
        return
    selected = sum(pipeline.selected_rows.sizes().values())
    needed = pipeline.position(max(pipeline.stage1_steps, pipeline.start.step)).stage1_rows
    if selected < needed:
        print(
            f"[{setup.arm}] {selected:,} selected rows are fewer than the {needed:,} that are "
            f"read of them ({pipeline.stage1_steps} steps × batch_size): each is read "
            f"{epochs[SELECTED]:.1f} times"
        )
    else:
        print(f"[{setup.arm}] stage 1 reads {needed:,} of the {selected:,} selected rows, once")
