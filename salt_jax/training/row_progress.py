"""How far a pass over rows is: rows/s and the time left, on the terminal or as lines in a log."""

import time
import types

import rich.console
import rich.progress

_LINES = 20


class RowProgress:
    """Rows done, rows/s and time left; a bar on a terminal, a line now and then elsewhere.

    The rate is over the time since the first rows were done, so that compiling is not in it.

    Args:
      title: What goes on ("score").
      rows: How many rows there are.
    """

    def __init__(self, title: str, rows: int) -> None:
        self._console = rich.console.Console()
        self._title, self._rows = title, rows
        self._done = self._lines = 0
        self._first_done, self._start = 0, 0.0
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=rows, status="")

    def add(self, rows: int) -> None:
        """Says that so many more rows are done."""
        now = time.perf_counter()
        if not self._done:
            self._first_done, self._start = rows, now
        self._done += rows
        seconds, timed = now - self._start, self._done - self._first_done
        status = ""
        if timed and seconds:
            rate = timed / seconds
            status = f"{rate:,.0f} rows/s  {(self._rows - self._done) / rate:,.0f} s left"
        self._bar.update(self._task, completed=self._done, status=status)
        if not self._console.is_terminal and self._done * _LINES // self._rows > self._lines:
            self._lines = self._done * _LINES // self._rows
            self._console.print(
                f"[{self._title}] {self._done:,}/{self._rows:,} rows  {status}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def __enter__(self) -> "RowProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._bar.stop()
