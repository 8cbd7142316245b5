"""How far a round of jobs is: a bar on a terminal, a line now and then elsewhere.

In: what each finished job has done. Out: jobs done, documents, tokens/s, and the time left.
"""

import time
import types

import rich.console
import rich.progress

from salt_jax.preparation.mapping import Progress

_LINES = 10


class JobProgress:
    """Shows the progress of one round."""

    def __init__(self, title: str, jobs: int, done: int):
        """Begins.

        Args:
          title: What the jobs are.
          jobs: Those to do now.
          done: Those that were finished before.
        """
        self._title, self._jobs, self._before = title, jobs, done
        self._done = self._documents = self._tokens = 0
        self._started = time.monotonic()
        self._console = rich.console.Console()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=done + jobs, completed=done, status="")

    def add(self, progress: Progress) -> None:
        """Counts a finished job."""
        self._done += 1
        self._documents += progress.documents
        self._tokens += progress.tokens
        seconds = max(time.monotonic() - self._started, 1e-3)
        status = f"{self._documents:,} documents  {self._tokens / seconds:,.0f} tokens/s"
        done = self._before + self._done
        self._bar.update(self._task, completed=done, status=status)
        often = max(self._jobs // _LINES, 1)
        if not self._console.is_terminal and self._jobs > 1 and self._done % often == 0:
            print(f"[{self._title}] {done}/{self._before + self._jobs}  {status}", flush=True)

    def __enter__(self) -> "JobProgress":
        if self._before and self._jobs:
            print(f"[{self._title}] {self._before} are finished, {self._jobs} are left.")
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._bar.stop()
