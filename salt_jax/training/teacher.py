"""The teacher: a frozen model beside the train state, gone at the switch.

In: a checkpoint. Out: parameters on the mesh, and a way to free them. It has no gradient, no
optimizer slot and no place in a checkpoint; the run records which teacher it was. Its parameters
may lie by rules of their own; its activations are laid out as the student's are. Stored soft labels
may stand for it.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import Selection
from salt_jax.data.soft_labels import StoredLabels
from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.training import partitioning
from salt_jax.training.caches import Caches
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.config import TrainConfig

DTYPES = ("float32", "bfloat16", "float16")


class LoadedTeacher:
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


def refuse_unused(config: TrainConfig) -> None:
    """Raises InputError where a teacher or soft labels are set that no step has a use for."""
    method, steps = config.method, config.data.selection_steps
    teacher = method.teacher and method.teacher.path
    for name, folder in (("teacher", teacher), ("soft_labels", method.soft_labels)):
        if folder is not None and not config.stage1_steps:
            raise InputError(
                f"{name} is {folder}, and the schedule {type(method.schedule).__name__} has no "
                f"stage 1 to use it in: leave {name} unset, or take another method "
                "(--gin_file=methods/…)."
            )
    if method.soft_labels is not None and steps not in (None, config.stage1_steps):
        raise InputError(
            f"selection_steps is {steps} and stage 1 has {config.stage1_steps} steps, and soft "
            "labels are read with its rows: leave selection_steps unset."
        )


def check_dtype(dtype: str | None) -> None:
    """Raises InputError where a teacher can't be held in a dtype; None is as it was saved."""
    if dtype not in (None, *DTYPES):
        raise InputError(
            f"The teacher's dtype is {dtype!r}, expected one of {', '.join(DTYPES)}: change "
            "--teacher.dtype."
        )


def find_teacher(config: TrainConfig, cache: PackedCache) -> SavedModel:
    """The model that teaches.

    Args:
      config: The run's settings.
      cache: What is trained on, with its vocabulary.

    Raises:
      InputError: None is set, there is none, it is of another vocabulary, or it lacks ids that it
        would have to read or, by the divergence, to give probability.
    """
    method, asked = config.method, config.method.teacher
    if asked is None or asked.path is None:
        raise InputError(
            f"The schedule {type(method.schedule).__name__} needs a teacher and none is set: add "
            "--teacher=FOLDER, the output of a `salt train` run, or --soft_labels=FOLDER."
        )
    check_dtype(asked.dtype)
    model = find_model(asked.path, asked.step, "teacher", cache)
    ids, lacks = cache.vocabulary_size, cache.vocabulary_size - (model.config.vocab_size or 0)
    objectives = config.data.objectives if asked.objectives == "all" else None
    if lacks and objectives is not None and objectives.uses_reserved_ids:
        raise InputError(
            f"The teacher {asked.path} lacks the last {lacks} of the cache's {ids} ids, the modes "
            "and sentinels of objectives: add --teacher.objectives=causal, which makes ω 0 on "
            "denoised rows, or take a teacher that has them."
        )
    losses.check_vocab_size(method.loss, ids, ids, ids - lacks, None)
    return model


def find_labels(config: TrainConfig, caches: Caches, selected: Selection | None) -> StoredLabels:
    """The soft labels that stand for a teacher.

    Args:
      config: The run's settings, with soft labels.
      caches: What is trained on.
      selected: Stage 1's own rows.

    Raises:
      InputError: They are not of these rows, or not for this loss; or a teacher is set as well.
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
            f"The soft labels {path} are of one cache, and cache names {len(caches.packed)}: name "
            "one, or set a teacher instead."
        )
    if config.data.objectives is not None:
        raise InputError(
            f"The soft labels {path} are of rows as they are, and objectives changes rows: leave "
            "it unset, or set a teacher instead."
        )
    labels = StoredLabels.open(path, cache_digest=caches.first.digest)
    labels.require_fit(
        temperature=method.loss.teacher_temperature,
        k=method.loss.teacher_top_k,
        selection_digest=selected.digest if selected else None,
    )
    return labels
