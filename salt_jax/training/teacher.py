"""The teacher: a frozen model beside the train state, gone at the switch.

In: a checkpoint. Out: parameters on the mesh, and a way to free them. It has no gradient, no
optimizer slot and no place in a checkpoint; the run records which teacher it was. Its parameters
may lie by rules of their own; its activations are laid out as the student's are.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel


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
