"""The teacher: a frozen model beside the train state, gone at the switch.

In: a checkpoint. Out: parameters on the mesh, and a way to free them. It has no gradient, no
optimizer slot and no place in a checkpoint; the run records which teacher it was. Its parameters
may lie by rules of their own; its activations are laid out as the student's are. Stored soft labels
may stand for it.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.data import denoisers
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import SoftLabels
from salt_jax.distill import losses, schedules
from salt_jax.errors import InputError
from salt_jax.training import partitioning
from salt_jax.training.caches import Caches
from salt_jax.training.checkpoints import SavedModel, find_model

DTYPES = ("float32", "bfloat16", "float16")


class Teacher:
    """A frozen model on the mesh.

    Args:
      model: Where it comes from.
      mesh: The student's.
      rules: From the logical axes of its parameters to the mesh's.
      dtype: What to hold it in; None is as it was saved.

    Attributes:
      model: Where it came from.
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
        """Gives the teacher's device memory back at once; running programs finish first."""
        for array in jax.tree.leaves(self.params):
            array.delete()
        self.params = None


def refuse_unused(
    schedule: schedules.Schedule,
    stage1_steps: int,
    selection_steps: int | None,
    teacher: str | None,
    teacher_step: int | None,
    soft_labels: str | None,
) -> None:
    """Raises InputError where a teacher or soft labels are set that no step has a use for."""
    if teacher_step is not None and teacher is None:
        raise InputError(
            f"teacher_step is {teacher_step} and teacher is not set: leave it out, or add "
            "--teacher=RUN."
        )
    for name, folder in (("teacher", teacher), ("soft_labels", soft_labels)):
        if folder is not None and not stage1_steps:
            raise InputError(
                f"{name} is {folder}, and the schedule {type(schedule).__name__} has no stage 1 to "
                f"use it in: leave {name} unset, or take another method (--gin_file=methods/…)."
            )
    if soft_labels is not None and selection_steps not in (None, stage1_steps):
        raise InputError(
            f"selection_steps is {selection_steps} and stage 1 has {stage1_steps} steps, and soft "
            "labels are read with its rows: leave selection_steps unset."
        )


def check_dtype(dtype: str | None) -> None:
    """Raises InputError where nothing can be held in teacher_dtype; None is as it was saved."""
    if dtype not in (None, *DTYPES):
        raise InputError(
            f"teacher_dtype is {dtype!r}, expected one of {', '.join(DTYPES)}: change "
            "--teacher_dtype."
        )


def find_teacher(
    path: str | None,
    step: int | None,
    dtype: str | None,
    cache: PackedCache,
    schedule: schedules.Schedule,
    loss: losses.LossConfig,
    objectives: denoisers.Objectives | None,
    teacher_objectives: str,
) -> SavedModel:
    """The model that teaches.

    Args:
      path: A run's folder.
      step: Its checkpoint; the newest by default.
      dtype: What it is to be held in.
      cache: What is trained on, with its vocabulary.
      schedule: Which asks for it.
      loss: The loss that it is for.
      objectives: What becomes of rows; None is nothing.
      teacher_objectives: Which of them it teaches, "all" or "causal".

    Raises:
      InputError: None is set, there is none, it is of another vocabulary, or it lacks ids that it
        would have to read or, by the divergence, to give probability.
    """
    check_dtype(dtype)
    if path is None:
        raise InputError(
            f"The schedule {type(schedule).__name__} needs a teacher and none is set: add "
            "--teacher=FOLDER, the output of a `salt train` run, or --soft_labels=FOLDER."
        )
    model = find_model(path, step, "teacher", cache)
    ids, lacks = cache.vocabulary_size, cache.vocabulary_size - (model.config.vocab_size or 0)
    read = objectives if teacher_objectives == "all" else None
    if lacks and read is not None and read.uses_reserved_ids:
        raise InputError(
            f"The teacher {path} lacks the last {lacks} of the cache's {ids} ids, the modes and "
            "sentinels of objectives: add --teacher_objectives=causal, which makes ω 0 on "
            "denoised rows, or take a teacher that has them."
        )
    losses.check_vocab_size(loss, ids, ids, ids - lacks, None)
    return model


def find_labels(
    path: str,
    teacher: str | None,
    caches: Caches,
    selected: Selection | None,
    loss: losses.LossConfig,
    objectives: denoisers.Objectives | None,
) -> SoftLabels:
    """The soft labels that stand for a teacher.

    Args:
      path: A folder made by `salt score --soft_labels=K`.
      teacher: The run of a teacher, which must not be set as well.
      caches: What is trained on.
      selected: Stage 1's own rows.
      loss: The loss that they are for.
      objectives: What becomes of rows.

    Raises:
      InputError: They are not of these rows, or not for this loss.
    """
    if teacher is not None:
        raise InputError(
            f"Both the teacher {teacher} and the soft labels {path} are set: leave one out "
            "(--teacher=None)."
        )
    if len(caches.packed) > 1:
        raise InputError(
            f"The soft labels {path} are of one cache, and cache names {len(caches.packed)}: name "
            "one, or set a teacher instead."
        )
    if objectives is not None:
        raise InputError(
            f"The soft labels {path} are of rows as they are, and objectives changes rows: leave "
            "it unset, or set a teacher instead."
        )
    labels = SoftLabels.open(path, cache_digest=caches.first.digest)
    labels.require_fit(
        temperature=loss.teacher_temperature,
        k=loss.teacher_top_k,
        selection_digest=selected.digest if selected else None,
    )
    return labels
