"""`salt train`: trains a model, as baseline or with a teacher (RKD, SALT, SALT_DS).

Compose gin files: a model (gin/models), a method (gin/methods), hardware (gin/hardware), or use a
whole run (gin/runs). The same command resumes a run that was stopped.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from salt_jax.cli.verb import Verb
from salt_jax.commands._hub_models import local_model
from salt_jax.data import denoisers
from salt_jax.data.input_pipeline import SELECTED, Position
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.data.vocabularies import VOCABULARY_FOLDER
from salt_jax.errors import InputError, Interrupted
from salt_jax.huggingface.tokenizer_files import TOKENIZER_FOLDER, copy_tokenizer
from salt_jax.models.attention import require_bidirectional
from salt_jax.models.decoder import DecoderConfig, stacked_params
from salt_jax.storage.buckets import is_remote
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import say, warn
from salt_jax.training import compilation, partitioning
from salt_jax.training.caches import Caches, make_pipeline
from salt_jax.training.checkpoint_items import require_path
from salt_jax.training.checkpoints import (
    SavedModel,
    complete_steps,
    find_model,
    mark_sent,
    read_progress,
    state_bytes,
    watched_in,
)
from salt_jax.training.config import FROM_FILES, Initial, Teacher, TrainConfig
from salt_jax.training.equal_cost import with_equal_cost
from salt_jax.training.evaluation import Evaluator
from salt_jax.training.fork import Fork, check_fork, find_fork
from salt_jax.training.hang_watch import HangWatch
from salt_jax.training.loop import Loop
from salt_jax.training.optimizers import make_transformation
from salt_jax.training.origin import origin_of, require_same_origin, scoring_cost
from salt_jax.training.stop_requests import StopRequests
from salt_jax.training.teacher import (
    LoadedTeacher,
    find_labels,
    find_teacher,
    projection_of,
    refuse_unused,
)
from salt_jax.training.train_state import StateLayout, TrainState, make_layout
from salt_jax.training.wandb_run import require_wandb

# Settings that change a run's result by rounding at most.
CHANGES_NO_RESULT = (
    *("TrainConfig.devices", "Devices.mesh", "Devices.rules", "Devices.compilation_cache"),
    *("Devices.microbatches", "Devices.stage1_microbatches", "MeshConfig", "Teacher.rules"),
    "Devices.compiler_options",
    "Data.read_threads",
    *("DecoderConfig.remat", "DecoderConfig.attention_backend", "LossConfig.chunk_tokens"),
    *("TrainConfig.log_every", "TrainConfig.hang_seconds"),
    *("TrainConfig.monitoring", "Monitoring"),
    "TrainConfig.fork_from",  # the same run, bit for bit
)

# Settings that may change on resuming; the batch size may, since positions count rows.
MAY_CHANGE = (
    *CHANGES_NO_RESULT,
    *("Data.batch_size", "TrainConfig.max_skipped_updates", "Devices.slice_gradient_dtype"),
    *("TrainConfig.checkpoints", "CheckpointConfig", "TrainConfig.evaluation", "Evaluation.every"),
    # Folders may be moved, since their contents are compared by digest.
    "TrainConfig.flops_of",  # its steps are in the checkpoint
    *("Data.cache", "Teacher.path", "Teacher.step", "Data.selection", "Method.soft_labels"),
)

_OF_ITS_RESULT = ("Data.batch_size", "TrainConfig.flops_of", "Devices.slice_gradient_dtype")

# Settings in which a fork and its trunk may differ.
MAY_DIFFER = (
    *(name for name in MAY_CHANGE if name not in _OF_ITS_RESULT),
    *("Step.n_kd", "Method.arm"),
)


def train(run: RunFolder, *, config: TrainConfig) -> None:
    """Trains a model on a packed cache, with or without a teacher.

    Args:
      run: The folder for checkpoints, metrics and results.
      config: The run's settings.

    Raises:
      InputError: Settings don't fit each other, the cache, the teacher or the devices.
    """
    data, method, devices = config.data, config.method, config.devices
    require_path(run.path)
    require_wandb(config.monitoring.wandb_project)
    if data.cache is None:
        raise InputError("cache is not set: add --cache=FOLDER, made by `salt prepare`.")
    caches = Caches.open(data.cache, data.weights)
    packed = caches.first
    initial = _find_initial(config.initial, packed)
    student = _student(config, initial, packed)
    mesh = devices.mesh.make()
    compilation.check_options(devices.compiler_options, mesh.local_devices[0])
    evaluator = _evaluator(config, student, caches, mesh)
    _mark_older_checkpoints(run)
    fork = find_fork(config, run, MAY_DIFFER)
    start, saved = _newest(run, fork)
    config = dataclasses.replace(config, steps=saved.get("total_steps", config.steps))
    selected = _selection(config)
    refuse_unused(config)
    taught_from = Position() if fork else start  # a fork's teacher is compared with its trunk's
    teacher, labels = _find_teaching(config, taught_from, watched_in(saved).n_kd, caches, selected)
    scoring = scoring_cost(selected, labels, method.arm)
    taught = teacher.config if teacher else None
    if not saved:
        config = with_equal_cost(config, student, taught, packed.sequence_length, scoring)
    denoising = _denoising(config, packed, student)
    optimizer = make_transformation(config.optimizer, config.steps, student)
    projected = projection_of(config, student, taught)
    layout = make_layout(student, optimizer, mesh, devices.rules, projected)
    kept = config.checkpoints.keep_last + len(config.checkpoints.keep_steps) + 1
    run.require_space(kept * state_bytes(layout), f"{kept} checkpoints")
    compilation.use_compilation_cache(devices.compilation_cache)
    run.resume(may_change=MAY_CHANGE)
    run.processes.watch()
    if _newest(run, fork)[0] != start:
        raise Interrupted(f"{run.path} has gone on by another process: run the same command again.")
    # Models are loaded before the folder is begun, so that a bad one leaves nothing there.
    watch, stop = HangWatch(config.hang_seconds, warn), StopRequests(run.processes.count > 1)
    with watch, watch.waiting_for("the models to load"), stop:
        pipeline = make_pipeline(config, caches, mesh, selected, start, denoising, labels)
        origin = origin_of(config, student, caches, selected, teacher, labels, denoising)
        if fork is not None:
            require_same_origin(saved, origin, f"Step {fork.step} of {fork.trunk}")
            if start.step >= config.stage1_steps:
                teacher, pipeline = None, dataclasses.replace(pipeline, soft_labels=None)
        loop = Loop(
            folder=run,
            config=config,
            layout=layout,
            pipeline=pipeline,
            sequence_length=packed.sequence_length,
            evaluator=evaluator,
            origin=origin,
            scoring=scoring,
            teacher=_load_teacher(method.teacher, teacher, layout),
            initial=_load_initial(None if start.step else initial, layout, config.seed),
        )
    if run.processes.count == 1 and (signal := stop.asked_by(start.step)):
        raise Interrupted(
            f"stopped by {signal} while models were loaded: run the same command again."
        )
    _begin(run, method.arm, initial, packed, fork)
    _describe(loop)
    run.write_summary(loop.run())


def _mark_older_checkpoints(run: RunFolder) -> None:
    """Completes what an older version sent to a bucket, before any process looks for it."""
    if is_remote(run.path):
        if run.processes.is_first:
            mark_sent(run.path)
        run.processes.wait("marked")


def _evaluator(
    config: TrainConfig, student: DecoderConfig, caches: Caches, mesh: Mesh
) -> Evaluator:
    """Evaluates in batches as large as the smaller microbatch of the two stages."""
    batch_size = config.data.batch_size
    both = config.devices.microbatches_of(2), config.devices.microbatches_of(1)
    for microbatches in both:
        partitioning.require_split(batch_size, mesh, microbatches)
    return Evaluator(
        student,
        caches.packed,
        "validation",
        batch_size // max(both),
        mesh,
        config.devices.rules,
        config.evaluation.rows,
        config.method.loss.chunk_tokens,
    )


def _begin(
    run: RunFolder, arm: str, initial: SavedModel | None, cache: PackedCache, fork: Fork | None
) -> None:
    """Makes the run's folder, with the tokenizer and what a fork starts from."""
    for change in run.begin(may_change=MAY_CHANGE):
        say(f"[{arm}] {change}")
    if run.processes.is_first:
        cache.vocabulary.save(run.path / VOCABULARY_FOLDER)
        if initial is not None and not cache.vocabulary.reserved:
            # The same vocabulary, so that the model's chat template and the like still hold.
            copy_tokenizer(initial.path / TOKENIZER_FOLDER, run.path / TOKENIZER_FOLDER)
    if fork is not None:
        fork.copy_into(run)


def _find_teaching(
    config: TrainConfig,
    start: Position,
    n_kd: int | None,
    caches: Caches,
    selected: Selection | None,
) -> tuple[SavedModel | None, StoredLabels | None]:
    """The teacher, or the soft labels that stand for it. A run that is resumed in stage 2 needs
    neither: they may be gone."""
    if start.step >= config.stage1_steps_after(n_kd):
        return None, None
    if config.method.soft_labels is not None:
        return None, find_labels(config, caches, selected)
    return find_teacher(_with_local_teacher(config), caches.first), None


def _with_local_teacher(config: TrainConfig) -> TrainConfig:
    """The config with a local folder in place of a teacher on the Hub."""
    method = config.method
    if method.teacher is None or method.teacher.path is None:
        return config
    teacher = dataclasses.replace(method.teacher, path=local_model(method.teacher.path))
    return dataclasses.replace(config, method=dataclasses.replace(method, teacher=teacher))


def _find_initial(initial: Initial | None, cache: PackedCache) -> SavedModel | None:
    if initial is None:
        return None
    if initial.path is None:
        raise InputError("initial is set without a folder: add --initial=RUN.")
    return find_model(local_model(initial.path), initial.step, "initial", cache)


def _student(config: TrainConfig, initial: SavedModel | None, cache: PackedCache) -> DecoderConfig:
    model, stacked = config.model, config.initial is not None and config.initial.stacked
    if model is None:
        if initial is None:
            raise InputError(
                "model is not set, and there is no initial model to take its shape "
                "from: add a gin file that sets it (--gin_file=models/llm_mini.gin, say), or "
                "--initial=RUN."
            )
        # An imported model may have 16-bit parameters, too imprecise to update.
        model = dataclasses.replace(initial.config, param_dtype="float32")
    if model.param_dtype != "float32":
        raise InputError(
            f"DecoderConfig.param_dtype is {model.param_dtype}, and a student's parameters and "
            "moments are kept in float32: change it, and set dtype for what to compute in."
        )
    if model.absent_ids:
        raise InputError(
            "The student would have ids that it cannot predict (DecoderConfig.absent_ids, which "
            "`salt transplant` sets): start from the model that was transplanted, or set a model."
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
        if stacked and initial.config.num_layers < model.num_layers:
            theirs = {**theirs, "num_layers": model.num_layers}
        differing = [
            f"{name} {value!r} (the student has {ours[name]!r})"
            for name, value in theirs.items()
            if value != ours[name]
        ]
        if differing:
            raise InputError(
                f"initial is {initial.path}, a model with {', '.join(differing)}: give the student "
                "the same shape, or leave model unset."
            )
    return model


def _newest(run: RunFolder, fork: Fork | None) -> tuple[Position, dict[str, Any]]:
    """The position and the JSON item of the run's newest checkpoint, or else of its trunk's."""
    steps = complete_steps(run.path)
    if not steps and fork is None:
        return Position(), {}
    path, step = (run.path, steps[-1]) if steps or fork is None else (fork.trunk, fork.step)
    progress = read_progress(path, step)
    rows = progress["rows_consumed"]
    return Position(step, rows["stage1"], rows["stage2"]), progress


def _selection(config: TrainConfig) -> Selection | None:
    path, steps = config.data.selection, config.data.selection_steps
    if path is None:
        if steps is not None:
            raise InputError(
                f"selection_steps is {steps} and there is no selection to read: add "
                "--selection=FOLDER."
            )
        return None
    selection = Selection.open(path)
    if steps is None and config.stage1_steps == 0:
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
    config: TrainConfig, cache: PackedCache, student: DecoderConfig
) -> denoisers.Denoising | None:
    objectives, teacher = config.data.objectives, config.method.teacher
    if objectives is None:
        return None
    if objectives.bidirectional_prefix:
        require_bidirectional(student.attention_backend)
    taught = teacher.objectives if teacher else "all"
    return denoisers.Denoising(
        objectives, cache.vocabulary, cache.sequence_length, config.data.seed, taught
    )


def _load_teacher(
    config: Teacher | None, model: SavedModel | None, layout: StateLayout
) -> LoadedTeacher | None:
    if config is None or model is None:
        return None
    return LoadedTeacher(model, layout.mesh, config.rules or layout.rules, config.dtype)


def _load_initial(model: SavedModel | None, layout: StateLayout, seed: int) -> TrainState | None:
    """A fresh state with the model's parameters."""
    if model is None:
        return None
    dtype = layout.config.param_dtype
    params = model.load_params(layout.mesh, layout.rules, dtype)
    layers = layout.config.num_layers
    if layers != model.config.num_layers:
        params = stacked_params(params, model.config, layers)
    return layout.around(params, seed)


def _describe(loop: Loop) -> None:
    """Prints what is about to run, and anything about it that may be unexpected."""
    config, pipeline, steps = loop.config, loop.pipeline, loop.config.steps
    says, epochs = f"[{config.method.arm}]", pipeline.epochs(steps)
    sizes = (pipeline.unused_rows or pipeline.all_rows).sizes()
    read = [
        f"{epochs[name]:.2f} epochs of {size:,} rows" + (f" of {name}" if len(sizes) > 1 else "")
        for name, size in zip(pipeline.sources, sizes.values(), strict=True)
    ]
    say(
        f"{says} {loop.layout.config.num_parameters:,} parameters, {steps} steps of "
        f"{pipeline.batch_size} × {loop.sequence_length} tokens, {', '.join(read)}, "
        f"{config.stage1_steps} steps with a teacher"
    )
    n_kd = getattr(config.method.schedule, "n_kd", None)
    if n_kd is not None and n_kd > steps:
        say(
            f"{says} n_kd {n_kd} is over the run's {steps} steps: the teacher stays to the end, "
            "and there is no stage 2"
        )
    warmup = getattr(config.optimizer.learning_rate, "warmup_steps", 0)
    if warmup > steps:
        say(
            f"{says} warmup_steps {warmup} is over the run's {steps} steps: the learning rate "
            "never reaches its peak"
        )
    if pipeline.selected_rows is None:
        return
    selected = sum(pipeline.selected_rows.sizes().values())
    needed = pipeline.position(max(pipeline.stage1_steps, pipeline.start.step)).stage1_rows
    if selected >= needed:
        say(f"{says} stage 1 reads {needed:,} of the {selected:,} selected rows, once")
    else:
        say(
            f"{says} {selected:,} selected rows are fewer than the {needed:,} that stage 1 reads "
            f"({pipeline.stage1_steps} steps × batch_size): each is read {epochs[SELECTED]:.1f} "
            "times"
        )


VERB = Verb(
    train,
    several_processes=True,
    saves_on_request=True,
    writes_to_buckets=True,
    changes_no_result=CHANGES_NO_RESULT,
    gin_files=FROM_FILES,
    check=check_fork,
)
