"""The frozen teacher of stage 1, or the stored soft labels that replace it.

A teacher is outside the train state: it has no gradient and no optimizer state, and a checkpoint
records only which model it was. Its parameters may have their own logical-axis rules; its
activations are sharded like the student's.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.distill import losses
from salt_jax.distill.gates import require_gate_of_labels
from salt_jax.distill.schedules import Adaptive
from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops, partitioning
from salt_jax.training.caches import Caches
from salt_jax.training.checkpoints import SavedModel, find_model, require_fit
from salt_jax.training.config import TrainConfig
from salt_jax.training.projection import ProjectionTrainer


class LoadedTeacher:
    """A frozen model on the mesh, sharded by `rules`, in `dtype` or the one it was saved in.

    Attributes:
      model: The checkpoint it was loaded from.
      params: Its parameters; None once freed.
    """

    def __init__(
        self,
        model: SavedModel,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        dtype: Any = None,
    ) -> None:
        self.model = model
        self.params: Any = model.load_params(mesh, rules, dtype)

    def free(self) -> None:
        """Frees the device memory at once; programs that still run finish first."""
        for array in jax.tree.leaves(self.params):
            array.delete()
        self.params = None


def refuse_unused(config: TrainConfig) -> None:
    """Raises InputError where a teacher or soft labels are set that no step uses."""
    method, steps = config.method, config.data.selection_steps
    teacher = method.teacher and method.teacher.path
    for name, folder in (("teacher", teacher), ("soft_labels", method.soft_labels)):
        if folder is not None and not config.stage1_steps:
            raise InputError(
                f"{name} is {folder}, and the schedule {type(method.schedule).__name__} has no "
                f"stage 1 to use it in: leave {name} unset, or choose another method "
                "(--gin_file=methods/…)."
            )
    if method.soft_labels is not None and steps not in (None, config.stage1_steps):
        raise InputError(
            f"selection_steps is {steps} and stage 1 has {config.stage1_steps} steps, and soft "
            "labels are read with its rows: leave selection_steps unset."
        )


def find_teacher(config: TrainConfig, cache: PackedCache) -> SavedModel:
    """The model that teaches the student on the rows of a cache.

    Raises:
      InputError: No teacher is set or found, its vocabulary differs, or it lacks ids that it would
        have to read or that the divergence needs.
    """
    method, teacher = config.method, config.method.teacher
    if teacher is None or teacher.path is None:
        raise InputError(
            f"The schedule {type(method.schedule).__name__} needs a teacher and none is set: add "
            "--teacher=FOLDER, the output of a `salt train` run, or --soft_labels=FOLDER."
        )
    model = find_model(teacher.path, teacher.step, "teacher")
    require_fit(model, cache, "teacher", more_ids=not config.has_soft_term)
    ids, lacks = cache.vocabulary_size, cache.vocabulary_size - (model.config.vocab_size or 0)
    objectives = config.data.objectives if teacher.objectives == "all" else None
    if lacks and objectives is not None and objectives.uses_reserved_ids:
        raise InputError(
            f"The teacher {teacher.path} lacks the last {lacks} of the cache's {ids} ids, the mode "
            "tokens and sentinels of objectives: add --teacher.objectives=causal, which makes ω 0 "
            "on denoised rows, or choose a teacher that has them."
        )
    if config.has_soft_term:
        losses.check_vocab_size(method.loss, ids, ids, ids - lacks, None)
    if model.config.absent_ids and isinstance(method.schedule, Adaptive):
        raise InputError(
            f"The teacher {teacher.path} was trained with another vocabulary, and has no loss on "
            "tokens that it lacks, which the schedule Adaptive would need: choose the schedule "
            "Step (--gin_file=methods/salt_top_k.gin)."
        )
    if config.has_soft_term and model.config.absent_ids and not method.loss.teacher_top_k:
        raise InputError(
            f"The teacher {teacher.path} was trained with another vocabulary and cannot predict "
            "all of the cache's ids: learn from its likeliest ones, which leaves the others as one "
            "outcome (--gin_file=methods/salt_top_k.gin)."
        )
    return model


def projection_of(
    config: TrainConfig, student: DecoderConfig, teacher: DecoderConfig | None
) -> ProjectionTrainer | None:
    """The projection between student and teacher; None if there is none.

    Raises:
      InputError: See `Alignment.is_projected`.
    """
    alignment = config.method.alignment
    if alignment is None or teacher is None:
        return None
    widths = student.embed_dim, teacher.embed_dim
    if not alignment.is_projected(student.num_layers, *widths):
        return None
    return ProjectionTrainer(*widths, config.optimizer.learning_rate.schedule(config.steps))


def teaching_flops_per_token(
    config: TrainConfig, student: DecoderConfig, teacher: DecoderConfig, sequence_length: int
) -> float:
    """Model FLOPs that stage 1 adds: the teacher's forward pass, and the training of a projection.

    Without a soft term the teacher's head isn't used.
    """
    total = flops.forward_flops_per_token(teacher, sequence_length)
    if not config.has_soft_term:
        total -= 2 * teacher.embed_dim * teacher.padded_vocab_size
    if projection_of(config, student, teacher) is not None:
        total += 6 * student.embed_dim * teacher.embed_dim
    return total


def find_labels(config: TrainConfig, caches: Caches, selected: Selection | None) -> StoredLabels:
    """The soft labels that replace a teacher on the rows of stage 1.

    Raises:
      InputError: They belong to other rows or another loss, or a teacher is set as well.
    """
    method, path = config.method, config.method.soft_labels
    assert path is not None, "soft labels are set"
    if method.teacher is not None:
        raise InputError(
            f"Both the teacher {method.teacher.path} and the soft labels {path} are set: leave one "
            "out (--teacher=None)."
        )
    if len(caches.packed) > 1:
        raise InputError(
            f"The soft labels {path} belong to one cache, and cache names {len(caches.packed)}: "
            "name one, or set a teacher instead."
        )
    if config.data.objectives is not None:
        raise InputError(
            f"The soft labels {path} are for unchanged rows, and objectives changes rows: leave "
            "it unset, or set a teacher instead."
        )
    labels = StoredLabels.open(path, cache_digest=caches.first.digest)
    labels.require_fit(
        temperature=method.loss.teacher_temperature,
        k=method.loss.teacher_top_k,
        selection_digest=selected.digest if selected else None,
    )
    require_gate_of_labels(method.loss.gate, method.loss.teacher_top_k or labels.format.k)
    return labels
