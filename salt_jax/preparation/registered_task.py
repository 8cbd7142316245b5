"""The name of a task in SeqIO's registry; TensorFlow is imported only when it is read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RegisteredTask:
    """A task of SeqIO's registry.

    Its `targets` must be token ids that end with the end of document. If it has an integer feature
    `subset`, rows carry it; the tasks of salt_jax.tasks have one.

    Attributes:
      name: The task's name, "pile" for example.
      module: The module that registers it, "salt_jax.tasks.pile" or your own; "" if it is
        registered already.
    """

    name: str
    module: str = ""
