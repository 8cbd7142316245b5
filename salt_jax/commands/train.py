"""`salt train`: trains a model, as baseline or with a teacher (RKD, SALT, SALT_DS).

Compose gin files: a model (gin/models), a method (gin/methods), hardware (gin/hardware), or take
a whole run (gin/runs). A run that was stopped goes on when the same command is given again.
"""

import dataclasses

import jax

from salt_jax.cli.verb import Verb
from salt_jax.data import denoisers
from salt_jax.data.input_pipeline import SELECTED, Position
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.vocabularies import VOCABULARY_FOLDER
from salt_jax.errors import InputError
from salt_jax.huggingface.tokenizer_files import TOKENIZER_FOLDER, copy_tokenizer
from salt_jax.models.attention import require_bidirectional
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import say
from salt_jax.training import compilation, partitioning
from salt_jax.training.caches import Caches, make_pipeline
from salt_jax.training.checkpoint_items import require_path
from salt_jax.training.checkpoints import (
    CheckpointConfig,
    SavedModel,
    complete_steps,
    find_model,
    read_progress,
    state_bytes,
)
from salt_jax.training.config import FROM_FILES, Devices, Initial, TrainConfig
from salt_jax.training.evaluation import Evaluator, MixtureEvaluator
from salt_jax.training.loop import Loop, TrainingSetup
from salt_jax.training.optimizers import make_transformation
from salt_jax.training.origin import origin_of, scoring_cost
from salt_jax.training.teacher import find_labels, find_teacher, refuse_unused
from salt_jax.training.train_state import StateLayout, make_layout

# How the run is computed and when it is told of: no result changes, but for rounding.
CHANGES_NO_RESULT = (
    *("TrainConfig.devices", "Devices", "MeshConfig", "Data.read_threads", "Teacher.rules"),
    *("DecoderConfig.remat", "DecoderConfig.attention_backend", "LossConfig.chunk_tokens"),
    *("TrainConfig.log_every", "TrainConfig.hang_seconds"),
)

# What may change when a run goes on: the batch size too, since positions count rows.
MAY_CHANGE = (
    *CHANGES_NO_RESULT,
    *("Data.batch_size", "TrainConfig.max_skipped_updates"),
    *("TrainConfig.checkpoints", "CheckpointConfig", "TrainConfig.evaluation", "Evaluation.every"),
    # Folders may be moved: what is in them is compared by digests.
    *("Data.cache", "Teacher.path", "Teacher.step", "Data.selection", "Method.soft_labels"),
)


def train(run: RunFolder, *, config: TrainConfig) -> None:
    """Trains a model on a packed cache, with or without a teacher.

    Args:
      run: The folder for checkpoints, metrics and results.
      config: The run's settings.

    Raises:
      InputError: Settings that don't fit each other, the cache, the teacher or the devices.
    """
    data, devices = config.data, config.devices
    require_path(run.path)
    if data.cache is None:
        raise InputError("cache is not set: add --cache=FOLDER, made by `salt prepare`.")
    caches = Caches.open(data.cache, data.weights)
    packed = caches.first
    initial_model = _initial(config.initial, packed)
    student = _student(config.model, initial_model, packed)
    mesh = devices.mesh.make()
    parts = _check_batch(data.batch_size, devices, mesh)
    start = _position(run)
    selected = _selection(config)
    refuse_unused(config)
    # A run that goes on in stage 2 has no need of its teacher, which may be gone.
    teacher_model, labels = None, None
    if start.step < config.stage1_steps and config.method.soft_labels is not None:
        labels = find_labels(config, caches, selected)
    elif start.step < config.stage1_steps:
        teacher_model = find_teacher(config, packed)
    layout = make_layout(
        student, make_transformation(config.optimizer, config.steps, student), mesh, devices.rules
    )
    setup = TrainingSetup(
        config=config,
        layout=layout,
        pipeline=make_pipeline(
            caches,
            partitioning.batch_part(mesh),
            batch_size=data.batch_size,
            seed=data.seed,
            selected=selected,
            stage1_steps=min(data.selection_steps or config.stage1_steps, config.steps),
            stage2_rows=data.stage2_rows,
            start=start,
            denoising=_denoising(config, packed, student),
            soft_labels=labels,
            read_threads=data.read_threads,
        ),
        sequence_length=packed.sequence_length,
        evaluator=_evaluator(caches, layout, data.batch_size // max(parts), config),
        evaluation_rows=_held_out_rows(caches, config.evaluation.rows),
        origin=origin_of(student, caches, config.method.schedule, selected, teacher_model, labels),
        teacher=teacher_model,
        scoring=scoring_cost(selected, labels, config.method.arm),
        initial=initial_model,
    )
    _begin(run, setup, packed)
    compilation.use_compilation_cache(devices.compilation_cache)
    run.write_summary(Loop(setup, run).run())


def _begin(run: RunFolder, setup: TrainingSetup, cache: PackedCache) -> None:
    _require_space(run, setup.config.checkpoints, state_bytes(setup.layout))
    for change in run.begin(may_change=MAY_CHANGE):
        say(f"[{setup.config.method.arm}] {change}")
    if run.processes.is_first:
        cache.vocabulary.save(run.path / VOCABULARY_FOLDER)
        _keep_tokenizer(run, setup.initial, cache)
    _describe(setup)


def _keep_tokenizer(run: RunFolder, initial: SavedModel | None, cache: PackedCache) -> None:
    """A model that was taken in keeps its chat template and the like when it is trained on."""
    # Without reserved ids the vocabularies are the same one, which find_model has seen to.
    if initial is not None and not cache.vocabulary.reserved:
        copy_tokenizer(initial.path / TOKENIZER_FOLDER, run.path / TOKENIZER_FOLDER)


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


def _initial(initial: Initial | None, cache: PackedCache) -> SavedModel | None:
    if initial is None:
        return None
    if initial.path is None:
        raise InputError("initial is set without a folder: add --initial=RUN.")
    return find_model(initial.path, initial.step, "initial", cache)


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


def _check_batch(batch_size: int, devices: Devices, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """The microbatches of a step of stage 1 and of stage 2."""
    divisor = partitioning.batch_divisor(mesh)
    first, second = devices.microbatches_of(1), devices.microbatches_of(2)
    for parts in (second, first):
        if batch_size % (divisor * parts):
            raise InputError(
                f"batch_size {batch_size} can't be split over {divisor} devices in {parts} "
                "microbatches: make it a multiple of devices × microbatches, or change "
                "microbatches or the mesh."
            )
    return first, second


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
    taught = teacher.objectives if teacher else "all"
    if taught not in denoisers.TEACHER_OBJECTIVES:
        raise InputError(
            f"The teacher's objectives are {taught!r}: set --teacher.objectives to 'all' or "
            "'causal'."
        )
    if objectives is None:
        return None
    if objectives.bidirectional_prefix:
        require_bidirectional(student.attention_backend)
    return denoisers.Denoising(
        objectives, cache.vocabulary, cache.sequence_length, config.data.seed, taught
    )


def _evaluator(
    caches: Caches, layout: StateLayout, batch_size: int, config: TrainConfig
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
            config.evaluation.rows,
            config.method.loss.chunk_tokens,
        )
        for name, cache in caches.packed.items()
    }
    return MixtureEvaluator(evaluators) if len(evaluators) > 1 else evaluators.popitem()[1]


def _held_out_rows(caches: Caches, rows: int | None) -> int:
    held_out = [len(cache.split("validation")) for cache in caches.packed.values()]
    return sum(min(rows or size, size) for size in held_out)


def _describe(setup: TrainingSetup) -> None:
    """Says what is about to run, and what a reader might not expect of it."""
    pipeline, steps, stage1_steps = setup.pipeline, setup.config.steps, setup.config.stage1_steps
    says, epochs = f"[{setup.config.method.arm}]", pipeline.epochs(steps)
    sizes = (pipeline.unused_rows or pipeline.all_rows).sizes()
    read = [
        f"{epochs[name]:.2f} epochs of {sizes[i]:,} rows"
        + (f" of {name}" if len(sizes) > 1 else "")
        for i, name in enumerate(pipeline.sources)
    ]
    say(
        f"{says} {setup.layout.config.num_parameters:,} parameters, {steps} steps of "
        f"{pipeline.batch_size} × {setup.sequence_length} tokens, {', '.join(read)}, "
        f"{stage1_steps} steps with a teacher"
    )
    n_kd = getattr(setup.config.method.schedule, "n_kd", None)
    if n_kd is not None and n_kd > steps:
        say(
            f"{says} n_kd {n_kd} is over the run's {steps} steps: the teacher stays "
            "to the end, and there is no stage 2"
        )
    if pipeline.selected_rows is None:
        return
    selected = sum(pipeline.selected_rows.sizes().values())
    needed = pipeline.position(max(pipeline.stage1_steps, pipeline.start.step)).stage1_rows
    if selected < needed:
        say(
            f"{says} {selected:,} selected rows are fewer than the {needed:,} that are "
            f"read of them ({pipeline.stage1_steps} steps × batch_size): each is read "
            f"{epochs[SELECTED]:.1f} times"
        )
    else:
        say(f"{says} stage 1 reads {needed:,} of the {selected:,} selected rows, once")


VERB = Verb(
    train,
    several_processes=True,
    saves_on_request=True,
    changes_no_result=CHANGES_NO_RESULT,
    gin_files=FROM_FILES,
)
