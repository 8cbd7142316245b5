"""Who does the jobs of a preparation, as a setting.

In: "local" or the name of one of Apache Beam's runners, and what it needs to know. Out: something
that runs jobs. Beam is imported when it is used.
"""

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from salt_jax.errors import InputError
from salt_jax.preparation.local_runner import default_workers, run_locally
from salt_jax.preparation.mapping import Progress, RunJobs
from salt_jax.storage.job_journal import JobJournal

LOCAL = "local"
BEAM_RUNNERS = ("DirectRunner", "PrismRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


@dataclasses.dataclass(frozen=True)
class JobRunner:
    """Runs jobs on this machine or through Beam.

    Attributes:
      runner: "local", one of BEAM_RUNNERS, or the full name of another runner's class
        ("package.module.Class").
      workers: Processes on this machine; None takes the cores that this process may use.
      beam_options: Beam's own options, each "--name=value".
    """

    runner: str = LOCAL
    workers: int | None = None
    beam_options: Sequence[str] = ()

    def __post_init__(self) -> None:
        known = (LOCAL, *BEAM_RUNNERS)
        if self.runner not in known and "." not in str(self.runner):
            near = difflib.get_close_matches(str(self.runner), known, n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise InputError(
                f"runner is {self.runner!r}, expected one of {', '.join(known)} or the full name "
                f"of a Beam runner's class{hint}."
            )
        workers = self.workers
        whole = isinstance(workers, int) and not isinstance(workers, bool)
        if workers is not None and not (whole and workers >= 1):
            raise InputError(f"workers is {workers!r}, expected a whole number of 1 or more.")
        if self.runner == LOCAL and self.beam_options:
            raise InputError(
                f"beam_options are given, but runner is {LOCAL!r}: name one of Beam's runners "
                f"({', '.join(BEAM_RUNNERS)}), or leave the options out."
            )
        if self.runner != LOCAL and workers is not None:
            raise InputError(
                f"workers is {workers}, but runner is {self.runner!r}: say in beam_options how "
                "many workers Beam shall take."
            )
        if self.runner != LOCAL and importlib.util.find_spec("apache_beam") is None:
            raise InputError(
                f"runner is {self.runner!r}, and Apache Beam is not installed: "
                f"pip install 'salt_jax[beam]' in an environment of its own, or take {LOCAL!r}."
            )

    def on(self, work: JobJournal) -> RunJobs:
        """The runner of a work folder's jobs."""

        def run(
            function: Callable[[Any], Progress], jobs: Sequence[Any], title: str, done: int
        ) -> None:
            if self.runner == LOCAL:
                workers = self.workers or default_workers()
                run_locally(function, jobs, title, done, workers=workers)
                return
            from salt_jax.preparation.beam_runner import run_on_beam

            run_on_beam(
                function,
                jobs,
                f"{title}: {len(jobs)} to do, {done} finished before",
                work=work,
                runner=self.runner,
                options=self.beam_options,
            )

        return run
