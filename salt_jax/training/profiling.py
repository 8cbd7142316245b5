"""A profile of some steps, as XProf and TensorBoard open it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

PROFILE_FOLDER = "profile"


class Profile:
    """Traces the steps `first` to `last`, both included, with `jax.profiler`.

    Each process writes its own trace to RUN/profile/plugins/profile/steps_FIRST_LAST/, when the
    last step is over. Steps are numbered as in metrics.
    """

    def __init__(self, run_path: pathlib.Path, steps: tuple[int, int] | None) -> None:
        self._first, self._last = steps or (0, 0)
        self._session = f"steps_{self._first}_{self._last}"
        self._target = run_path / PROFILE_FOLDER / "plugins" / "profile" / self._session
        self._traced: tempfile.TemporaryDirectory[str] | None = None

    def is_missed(self, first_step: int) -> bool:
        """Whether a run that continues after `first_step` steps has no step left to trace, and an
        earlier start didn't trace them."""
        return 0 < self._last <= first_step and not self._target.exists()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks the step inside the context; begins the trace with the first."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._traced is None:
            self._traced = tempfile.TemporaryDirectory(prefix="salt_profile_")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the steps down
            options.session_id = self._session
            jax.profiler.start_trace(self._traced.name, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def end_after(self, number: int, metrics: Any) -> None:
        """Writes the trace if `number` is the last step, once the devices have its metrics."""
        if number == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes what has been traced."""
        if self._traced is None:
            return
        jax.profiler.stop_trace()
        self._target.mkdir(parents=True, exist_ok=True)
        # Files are called after the host, which several processes may share.
        several = f"process_{jax.process_index()}." if jax.process_count() > 1 else ""
        for file in pathlib.Path(self._traced.name).rglob("*.*"):
            if file.is_file():
                (self._target / f"{several}{file.name}").write_bytes(file.read_bytes())
        self._traced.cleanup()
        self._traced = None
