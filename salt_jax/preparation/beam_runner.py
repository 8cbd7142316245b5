"""Runs jobs on Apache Beam: Dataflow, Flink, Spark, or Beam on this machine.

The workers must have salt_jax installed and see the input files and the output folder under the
same paths (a shared disk, a mounted bucket). A permanent error is written to a file in the work
folder and raised once the pipeline has ended, since a runner would report it by a long traceback.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dataflow.dataflow_runner import DataflowRuntimeException
from apache_beam.runners.runner import PipelineState

from salt_jax.errors import InputError, RunFailed
from salt_jax.preparation.local_runner import Progress
from salt_jax.storage.job_journal import JobJournal
from salt_jax.storage.manifests import json_digest
from salt_jax.terminal import say

_FAILURES = "failure-*.json"


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A function whose permanent errors are written to files."""

    function: Callable[[Any], Progress]
    work: JobJournal

    def __call__(self, job: Any) -> None:
        try:
            self.function(job)
        except (InputError, OSError) as error:
            failure: list[Any] = [str(error)]
            if isinstance(error, OSError) and error.errno is not None:
                failure = [error.errno, error.strerror, error.filename]
            name = f"failure-{json_digest(failure)[:16]}.json"
            self.work.write(name, {"arguments": failure})


def run_on_beam(
    function: Callable[[Any], Progress],
    jobs: Sequence[Any],
    title: str,
    work: JobJournal,
    runner: str,
    options: Sequence[str],
) -> None:
    """Calls the function with each job, in one pipeline, as `JobRunner.run`; error files are kept
    in the work folder."""
    say(f"[{runner}] {title}")
    if not jobs:
        return
    for failure in work.path.glob(_FAILURES):
        failure.unlink()
    try:
        pipeline = apache_beam.Pipeline(runner, PipelineOptions(list(options)))
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(
            f"Beam cannot start the runner {runner!r} ({_first_line(error)}): correct "
            "--runner or --beam_options."
        ) from error
    _ = (
        pipeline
        | apache_beam.Create(list(jobs), reshuffle=False)
        # Prevents Beam from fusing jobs into one bundle.
        | apache_beam.Reshuffle()
        | apache_beam.Map(_Guarded(function, work))
    )
    try:
        state = pipeline.run().wait_until_finish()
    except (RuntimeError, DataflowRuntimeException) as error:
        raise _failed(_first_line(error)) from error
    if state != PipelineState.DONE:
        raise _failed(f"it ended as {state}")
    for failure in sorted(work.path.glob(_FAILURES)):
        arguments = (work.read(failure.name) or {})["arguments"]
        raise InputError(*arguments) if len(arguments) == 1 else OSError(*arguments)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _failed(why: str) -> RunFailed:
    return RunFailed(f"Beam's pipeline failed ({why}): run the same command again to resume.")
