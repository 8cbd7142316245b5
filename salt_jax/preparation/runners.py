"""Runs the jobs of a preparation, on this machine or through Apache Beam."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from salt_jax.errors import InputError, nearest, require_counts
from salt_jax.preparation.local_runner import Progress, run_locally
from salt_jax.storage.job_journal import JobJournal

LOCAL = "local"
BEAM_RUNNERS = ("DirectRunner", "PrismRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


@dataclasses.dataclass(frozen=True)
class JobRunner:
    """Where jobs run.

    Attributes:
      runner: "local", one of Beam's ("DirectRunner", "PrismRunner", "DataflowRunner",
        "FlinkRunner", "SparkRunner"), or the full name of another Beam runner's class.
      workers: Processes on this machine; one per core by default.
      beam_options: Beam's own options, each "--name=value".
    """

    runner: str = "local"
    workers: int | None = None
    beam_options: Sequence[str] = ()

    def __post_init__(self) -> None:
        known = (LOCAL, *BEAM_RUNNERS)
        if self.runner not in known and "." not in self.runner:
            raise InputError(
                f"runner is {self.runner!r}{nearest(self.runner, known)}, expected one of "
                f"{', '.join(known)} or the full name of a Beam runner's class: change --runner."
            )
        require_counts(workers=self.workers)
        if self.runner == LOCAL and self.beam_options:
            raise InputError(
                f"beam_options are given, but runner is {LOCAL!r}: set --runner to one of Beam's "
                f"({', '.join(BEAM_RUNNERS)}), or leave the options out."
            )
        if self.runner != LOCAL and self.workers is not None:
            raise InputError(
                f"workers is {self.workers}, but runner is {self.runner!r}: set the number of "
                "Beam's workers in beam_options."
            )
        if self.runner != LOCAL and importlib.util.find_spec("apache_beam") is None:
            raise InputError(
                f"runner is {self.runner!r}, and Apache Beam is not installed: "
                f"pip install 'salt_jax[beam]' in an environment of its own, or use {LOCAL!r}."
            )

    def run(
        self,
        function: Callable[[Any], Progress],
        jobs: Sequence[Any],
        title: str,
        done: int,
        work: JobJournal,
    ) -> None:
        """Calls a function with each job, in any order and perhaps more than once.

        Args:
          function: An importable function.
          jobs: Its arguments, picklable.
          title: What the jobs are, for the terminal.
          done: How many were finished before.
          work: The folder that they work in.

        Raises:
          InputError, OSError: The function raised it; or Beam cannot start the runner.
          Interrupted: A stop signal arrived while several processes ran.
          RunFailed: A process was killed, or Beam's pipeline failed.
        """
        if self.runner == LOCAL:
            run_locally(function, jobs, title, done, self.workers)
            return
        from salt_jax.preparation.beam_runner import run_on_beam

        title = f"{title}: {len(jobs)} to do, {done} finished before"
        run_on_beam(function, jobs, title, work, self.runner, self.beam_options)
