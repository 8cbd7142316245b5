"""A SeqIO task by name, as a setting: no TensorFlow is imported until it is read.

In: the task's name and the module that registers it. Out: what `salt prepare` takes as its `task`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RegisteredTask:
    """A task of SeqIO's registry.

    Its `targets` must be token ids with the end of document already there. Where it has an integer
    feature `subset`, rows carry it; any task of salt_jax.tasks has one.

    Attributes:
      name: "pile", say.
      module: What to import first, "salt_jax.tasks.pile" or one's own; "" if that is done already.
    """

    name: str
    module: str = ""
