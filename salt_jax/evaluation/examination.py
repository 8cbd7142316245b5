"""What the examinations of `salt evaluate` have in common: who is examined, and how one is held.

In: a saved model and where to compute with it. Out: what an examination may ask of it. The three
are held_out.py (rows of a cache), few_shot.py (tasks of lm-eval) and responses.py (its own words).
"""

import dataclasses
import pathlib
from typing import Any, Protocol

from jax.sharding import Mesh

from salt_jax.data.vocabularies import Vocabulary
from salt_jax.distill import losses
from salt_jax.errors import require_counts
from salt_jax.evaluation.request_log import RequestLog
from salt_jax.inference.generation import Generator
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel

_REQUESTS_FILE = "requests.jsonl"


@dataclasses.dataclass(frozen=True)
class Examinee:
    """A saved model, and how it is computed with.

    Attributes:
      saved: The model.
      mesh: Where its parameters will live.
      rules: From logical to mesh axes.
      batch_size: Rows, sequences or prompts at once.
      chunk_tokens: Tokens whose logits a device holds at once.

    Raises:
      InputError: A count below 1.
    """

    saved: SavedModel
    mesh: Mesh
    rules: partitioning.Rules = partitioning.DEFAULT_RULES
    batch_size: int = 64
    chunk_tokens: int = losses.LossConfig.chunk_tokens

    def __post_init__(self) -> None:
        require_counts(batch_size=self.batch_size, chunk_tokens=self.chunk_tokens)

    @property
    def title(self) -> str:
        """What tables are headed by."""
        return f"{self.saved.path} at step {self.saved.step}"

    def generator(self, vocabulary: Vocabulary) -> Generator:
        """What continues prompts with it."""
        return Generator(
            self.saved.config,
            vocabulary,
            self.mesh,
            self.rules,
            batch_size=self.batch_size,
            end_ids=self.saved.end_ids(),
        )

    def request_log(
        self, folder: pathlib.Path, vocabulary: Vocabulary, prepend_start: bool
    ) -> RequestLog:
        """Its answers that are in a run's folder: one log for all examinations."""
        context = {
            "model": self.saved.digest,
            "config": self.saved.config.to_json(),
            "vocabulary": vocabulary.fingerprint,
            "prepend_start": prepend_start,
        }
        if ends := set(self.saved.end_ids()) - {vocabulary.eos_id}:
            context["end_ids"] = sorted(ends)
        return RequestLog(folder / _REQUESTS_FILE, context)


class Examination(Protocol):
    """One way to judge a model. Making one checks all that it is given and writes nothing."""

    def __call__(self, params: Any, folder: pathlib.Path) -> dict[str, Any]:
        """Examines the model, and prints what came out.

        Args:
          params: The model's parameters, on the mesh.
          folder: The run's, for files that are the examination's own.

        Returns:
          Its part of summary.json.
        """
