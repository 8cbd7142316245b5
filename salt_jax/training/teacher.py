"""The teacher: a frozen model beside the train state, gone at the switch.

In: a checkpoint. Out: parameters on the mesh, and a way to free them. It has no gradient, no
optimizer
slot and no place in a checkpoint; the run records which teacher it was.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.errors import InputError
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel


class Teacher:
    """A frozen model on the mesh.

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


def require_same_vocabulary(
    model: SavedModel, fingerprint: str, owner: str, role: str = "teacher"
) -> None:
    """Soft labels and scores mean something only over the same tokens.

    Args:
      model: The teacher or scorer.
      fingerprint: The vocabulary that it must have been trained with.
      owner: Whose fingerprint that is, for the error.
      role: What the model is here.

    Raises:
      InputError: Another vocabulary.
    """
    if model.vocabulary_fingerprint != fingerprint:
        raise InputError(
            f"The {role} {model.path} was trained with the vocabulary "
            f"{model.vocabulary_fingerprint[:12]} and {owner} has {fingerprint[:12]}: a {role} "
            "must share the student's tokenizer; use a cache prepared with the same vocabulary, or "
            f"another {role}."
        )
