"""A saved model and the names of tasks in; what the harness needs to ask it out.

The names may be lm-eval's, of tasks of a folder of YAML files, or salt_suite: see harness_tasks.py.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from salt_jax.errors import InputError
from salt_jax.evaluation.continuations import Continuations
from salt_jax.evaluation.harness import HarnessModel
from salt_jax.evaluation.harness_tasks import SUITE, Tasks
from salt_jax.evaluation.likelihood import Scorer
from salt_jax.evaluation.request_log import RequestLog
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.generation import Generator

__all__ = ["SUITE", "FewShot", "Tasks"]


class FewShot:
    """Tasks to ask a saved model, their data sets loaded.

    Args:
      saved: The model.
      names: Of tasks or groups.
      shots: Examples in a prompt; each task's own number by default.
      folder: A folder of YAML files of more tasks.
      allow_code_execution: Whether tasks may execute what the model writes.

    Attributes:
      tasks: All that there are.
      loaded: Those named.

    Raises:
      InputError: An unknown name, a data set that isn't there, or a model without its vocabulary.
    """

    def __init__(
        self,
        saved: SavedModel,
        names: Sequence[str],
        shots: int | None = None,
        folder: str | None = None,
        allow_code_execution: bool = False,
    ) -> None:
        if jax.process_count() > 1:
            raise InputError(
                f"--tasks runs in one process and this is one of {jax.process_count()}: run it on "
                "the devices of one machine."
            )
        self._saved, self._vocabulary = saved, saved.load_vocabulary()
        self.tasks = Tasks(folder, allow_code_execution)
        self.loaded = self.tasks.load(names, shots)

    @contextlib.contextmanager
    def asking(
        self,
        log_file: pathlib.Path,
        params: Any,
        mesh: Mesh,
        rules: partitioning.Rules,
        batch_size: int,
        chunk_tokens: int,
        *,
        prepend_start: bool = True,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Iterator[HarnessModel]:
        """The model as the harness asks it.

        Args:
          log_file: Holds all answers; those that are in it are not computed again.
          params: The model's parameters, on the mesh.
          mesh: Where to compute.
          rules: From logical to mesh axes.
          batch_size: Sequences at once.
          chunk_tokens: Tokens whose logits a device holds at once.
          prepend_start: Whether the vocabulary's start comes before every text.
          max_new_tokens: At most so many tokens are generated, whatever a task asks for.
          seed: Of tasks that draw tokens by lot.
        """
        config = self._saved.config
        generator = Generator(config, self._vocabulary, mesh, rules, batch_size=batch_size)
        context = {
            "model": self._saved.digest,
            "vocabulary": self._vocabulary.fingerprint,
            "prepend_start": prepend_start,
            "seed": seed,
        }
        with RequestLog(log_file, context) as log:
            yield HarnessModel(
                Scorer(config, params, mesh, rules, batch_size, chunk_tokens),
                Continuations(generator, params, prepend_start, seed),
                self._vocabulary,
                config.max_length,
                log,
                batch_size=batch_size,
                prepend_start=prepend_start,
                max_new_tokens=max_new_tokens,
            )
