"""`salt train`: trains a model, as baseline or with a teacher (RKD, SALT, SALT_DS).

Compose gin files: a model (gin/models), a method (gin/methods), hardware (gin/hardware), or take
a whole run (gin/runs). A run that was stopped goes on when the same command is given again.
"""

import dataclasses
from typing import Any

import jax

from salt_jax.data.input_pipeline import InputPipeline, RowOrder
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.distill import losses, schedules
from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.run_folder import RunFolder
from salt_jax.training import compilation, partitioning
from salt_jax.training.checkpoints import (
    CheckpointConfig,
    SavedModel,
    complete_steps,
    find_model,
    state_bytes,
)
from salt_jax.training.evaluation import Evaluator
from salt_jax.training.ledger import Cost, known_cost
from salt_jax.training.loop import Loop, TrainingSetup
from salt_jax.training.optimizers import OptimizerConfig
from salt_jax.training.train_state import make_layout


def train(
    run: RunFolder,
    *,
    model: DecoderConfig,
    cache: str,
    steps: int,
    batch_size: int,
    optimizer: OptimizerConfig,
    schedule: schedules.Schedule,
    loss: losses.LossConfig,
    arm: str,
    seed: int = 0,
    data_seed: int = 0,
    teacher: str | None = None,
    teacher_step: int | None = None,
    teacher_dtype: str | None = None,
    selection: str | None = None,
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
    max_skipped_updates: int = 10,
    compilation_cache: str = compilation.DEFAULT_FOLDER,
) -> None:
    """Trains a model on a packed cache, with or without a teacher.

    Args:
      run: The folder for checkpoints, metrics and results.
      model: The student; its vocab_size is the cache's where it is not set.
      cache: A folder made by `salt prepare`.
      steps: Updates of the whole run.
      batch_size: B, rows of the global batch.
      optimizer: The optimizer and its learning rate.
      schedule: ω by step: which steps have a teacher, and how much it counts.
      loss: Temperatures, divergence, z-loss.
      arm: The method's name in reports ("baseline", "salt").
      seed: Of the student's initialisation.
      data_seed: Of the order of rows; the same for all arms that are to be compared.
      teacher: A run's folder whose model teaches in stage 1.
      teacher_step: Its checkpoint; the newest by default.
      teacher_dtype: What to hold it in, "bfloat16" for one; as it was saved by default.
      selection: A folder made by `salt select`: stage 1 reads its rows alone (SALT_DS).
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
      max_skipped_updates: Non-finite updates to skip before the run stops.
      compilation_cache: Where compiled programs are kept between runs; "" keeps none.

    Raises:
      InputError: Settings that don't fit each other, the cache, the teacher or the devices.
    """
    packed = PackedCache.open(cache)
    config = _student(model, packed)
    device_mesh = mesh.make()
    _check_at_least(
        1, steps=steps, batch_size=batch_size, evaluate_every=evaluate_every, log_every=log_every
    )
    _check_at_least(1, evaluation_rows=1 if evaluation_rows is None else evaluation_rows)
    _check_at_least(0, max_skipped_updates=max_skipped_updates, seed=seed, data_seed=data_seed)
    _check_keep_steps(checkpoints, steps)
    for parts in {microbatches, stage1_microbatches or microbatches}:
        _check_batch(batch_size, parts, device_mesh)
    stage1_steps = schedule.distill_steps(steps)
    teacher_model = None
    # A run that goes on in stage 2 has no need of its teacher, which may be gone.
    if max([0, *complete_steps(run.path)]) < stage1_steps:
        teacher_model = _teacher(teacher, teacher_step, packed, schedule, loss)
    selected = _selection(selection, packed, stage1_steps)
    held_out = len(packed.split("validation"))
    layout = make_layout(config, optimizer.make(steps), device_mesh, rules)
    setup = TrainingSetup(
        arm=arm,
        steps=steps,
        seed=seed,
        layout=layout,
        loss=loss,
        schedule=schedule,
        pipeline=_pipeline(packed, batch_size, data_seed, selected, stage1_steps),
        sequence_length=packed.sequence_length,
        evaluator=Evaluator(
            config,
            packed,
            "validation",
            # No more rows at once than a step has room for.
            batch_size // max(microbatches, stage1_microbatches or microbatches),
            device_mesh,
            rules,
            evaluation_rows,
            loss.chunk_tokens,
        ),
        evaluation_rows=min(evaluation_rows or held_out, held_out),
        learning_rate=optimizer.learning_rate.schedule(steps),
        checkpoints=checkpoints,
        origin=_origin(config, packed, schedule, selected, teacher_model),
        teacher=teacher_model,
        teacher_dtype=teacher_dtype,
        teacher_rules=teacher_rules,
        scoring=_scoring_cost(selected, arm),
        initial=_initial(initial, initial_step, config, packed),
        microbatches=microbatches,
        stage1_microbatches=stage1_microbatches,
        evaluate_every=evaluate_every,
        log_every=log_every,
        max_skipped_updates=max_skipped_updates,
    )
    kept = checkpoints.keep_last + len(checkpoints.keep_steps) + 1
    run.require_space(kept * state_bytes(layout), f"{kept} checkpoints")
    run.begin()
    _describe(setup, packed, batch_size, selected)
    compilation.use_compilation_cache(compilation_cache)
    run.write_summary(Loop(setup, run).run())


def _student(model: DecoderConfig, cache: PackedCache) -> DecoderConfig:
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
    return model


def _check_at_least(least: int, **settings: int) -> None:
    for name, value in settings.items():
        if value < least:
            raise InputError(f"{name} is {value} and must be at least {least}: change --{name}.")


def _check_keep_steps(checkpoints: CheckpointConfig, steps: int) -> None:
    if any(not 0 < step <= steps for step in checkpoints.keep_steps):
        raise InputError(
            f"CheckpointConfig.keep_steps is {tuple(checkpoints.keep_steps)} and the run has "
            f"{steps} steps: keep steps from 1 to {steps} (--gin.KEEP_STEPS), or raise --steps."
        )


def _check_batch(batch_size: int, microbatches: int, mesh: jax.sharding.Mesh) -> None:
    divisor = partitioning.batch_divisor(mesh)
    if microbatches < 1 or batch_size % (divisor * microbatches):
        raise InputError(
            f"batch_size {batch_size} can't be split over {divisor} devices in {microbatches} "
            "microbatches: make it a multiple of devices × microbatches, or change microbatches "
            "(at least 1) or the mesh."
        )


def _teacher(
    path: str | None,
    step: int | None,
    cache: PackedCache,
    schedule: schedules.Schedule,
    loss: losses.LossConfig,
) -> SavedModel:
    if loss.teacher_top_k > cache.vocabulary_size:
        raise InputError(
            f"LossConfig.teacher_top_k is {loss.teacher_top_k} and the vocabulary has "
            f"{cache.vocabulary_size} ids: lower it, or set it to 0 for all."
        )
    if path is None:
        raise InputError(
            f"The schedule {type(schedule).__name__} needs a teacher and none is set: add "
            "--teacher=FOLDER, the output of a `salt train` run."
        )
    return find_model(path, step, "teacher", cache)


def _selection(path: str | None, cache: PackedCache, stage1_steps: int) -> Selection | None:
    if path is None:
        return None
    selection = Selection.open(path, cache_digest=cache.digest)
    if stage1_steps == 0:
        raise InputError(
            f"selection is {path}, but the schedule has no stage 1 to read it in: leave selection "
            "unset, or choose a schedule with n_kd over 0."
        )
    if selection.manifest["split"] != "train":
        raise InputError(
            f"The selection {path} is of the {selection.manifest['split']} split: select from "
            "scores of the train split."
        )
    return selection


def _pipeline(
    cache: PackedCache,
    batch_size: int,
    data_seed: int,
    selected: Selection | None,
    stage1_steps: int,
) -> InputPipeline:
    rows = cache.split("train")
    return InputPipeline(
        split=rows,
        batch_size=batch_size,
        start_id=cache.start_id,
        all_rows=RowOrder(None, len(rows), data_seed),
        selected_rows=RowOrder(selected.row_ids, 0, data_seed) if selected else None,
        stage1_steps=stage1_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _scoring_cost(selected: Selection | None, arm: str) -> Cost | None:
    """What the scores behind a selection cost; a run that reads it begins with that spent."""
    if selected is None:
        return None
    cost = selected.manifest.get("scoring_cost")
    if cost is None:
        print(
            f"[{arm}] the selection {selected.path} doesn't say what its scores cost (another "
            "version of salt_jax made them): this run is not charged for them"
        )
        return None
    return Cost(**cost)


def _origin(
    config: DecoderConfig,
    cache: PackedCache,
    schedule: schedules.Schedule,
    selected: Selection | None,
    teacher: SavedModel | None,
) -> dict[str, Any]:
    """What checkpoints record of where a run comes from."""
    cost = known_cost(teacher.counters) if teacher else None
    return {
        "model": config.to_json(),
        "vocabulary_fingerprint": cache.vocabulary_fingerprint,
        "cache_digest": cache.digest,
        "selection_digest": selected.digest if selected else None,
        "schedule": {type(schedule).__name__: vars(schedule)},
        "teacher": {**teacher.identity, "training_cost": cost} if teacher else None,
    }


def _shape(config: DecoderConfig) -> DecoderConfig:
    """Without what says how to compute and not what."""
    return dataclasses.replace(
        config, remat="none", dtype="float32", max_length=1, attention_backend="xla"
    )


def _initial(
    path: str | None, step: int | None, config: DecoderConfig, cache: PackedCache
) -> SavedModel | None:
    if path is None:
        return None
    model = find_model(path, step, "initial", cache)
    if _shape(model.config) != _shape(config):
        raise InputError(
            f"The initial model {path} is a {model.config} and the student a {config}: give the "
            "student the same shape."
        )
    return model


def _describe(
    setup: TrainingSetup, cache: PackedCache, batch_size: int, selected: Selection | None
) -> None:
    """Says what is about to run, and what a reader might not expect of it."""
    config, rows = setup.layout.config, len(cache.split("train"))
    print(
        f"[{setup.arm}] {config.num_parameters:,} parameters, {setup.steps} steps of {batch_size} "
        f"× {cache.sequence_length} tokens, {setup.steps * batch_size / rows:.2f} epochs of "
        f"{rows:,} rows, {setup.stage1_steps} steps with a teacher"
    )
    n_kd = getattr(setup.schedule, "n_kd", None)
    if n_kd is not None and n_kd > setup.steps:
        print(
            f"[{setup.arm}] n_kd {n_kd} is over the run's {setup.steps} steps: the teacher stays "
            "to the end, and there is no stage 2"
        )
    needed = setup.stage1_steps * batch_size
    if selected is not None and len(selected.row_ids) < needed:
        print(
            f"[{setup.arm}] {len(selected.row_ids):,} selected rows are fewer than the {needed:,} "
            f"that stage 1 reads (n_kd × batch_size): each is read "
            f"{needed / len(selected.row_ids):.1f} times"
        )
