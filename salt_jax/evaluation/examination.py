"""The interface of the examinations of `salt evaluate`, and the model that they examine.

There are three: held_out.py (rows of a cache), few_shot.py (tasks of lm-eval) and responses.py
(generated responses against those of a file).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from jax.sharding import Mesh

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.distill import losses
from salt_jax.errors import require_counts
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel

# Writes its files into the run's folder, prints its results, returns its part of summary.json.
Examine = Callable[[pathlib.Path], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Examinee:
    """A saved model and how to compute with it; InputError for a count below 1.

    Attributes:
      batch_size: Rows, sequences or prompts at once.
      chunk_tokens: Tokens whose logits a device holds at once.
      parse_special: Whether the name of a special token in a text is read as that token.
    """

    saved: SavedModel
    mesh: Mesh
    rules: partitioning.Rules = partitioning.DEFAULT_RULES
    batch_size: int = 64
    chunk_tokens: int = losses.LossConfig.chunk_tokens
    parse_special: bool = True

    def __post_init__(self) -> None:
        require_counts(batch_size=self.batch_size, chunk_tokens=self.chunk_tokens)

    @functools.cached_property
    def params(self) -> Any:
        """The parameters, on the mesh; loaded when they are first needed."""
        return self.saved.load_params(self.mesh, self.rules)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary it was trained with."""
        return self.saved.load_vocabulary()

    @property
    def title(self) -> str:
        """The heading of its tables."""
        return f"{self.saved.path} at step {self.saved.step}"


class Examination(Protocol):
    """A way to evaluate a model: a group of settings of `salt evaluate`."""

    def prepare(self, examinee: Examinee) -> Examine:
        """Checks settings and input (InputError) without writing anything; returns the function to
        run."""
