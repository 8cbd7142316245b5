"""Terminal output: lines, tables and progress bars. Nothing else in the package prints.

Names, prompts and rows are untrusted, so control characters are escaped and rich's markup is off.
"""

import dataclasses
import datetime
import sys
import time
from collections.abc import Iterator, Sequence

import rich.progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from salt_jax.errors import visible

WIDTH_OFF_TERMINAL = 120
_PADDING = 3  # of a cell, with its separator
_EDGES = 1  # of a table
_MOST_OF_A_NAME = 400  # characters, more than a long path has
_LINES = 10  # progress lines in all, when not on a terminal
# Unprintable by Python's rules but harmless: tabs, wide spaces, (non-)joiners.
WRITING = "\t\xa0\u202f\u3000\u200c\u200d"


def say(*lines: str) -> None:
    """Prints lines to stdout, control characters escaped."""
    print("\n".join(visible(line, WRITING) for line in lines), flush=True)


def warn(sentence: str) -> None:
    """Prints a sentence to stderr, on one line."""
    print(f"salt: {visible(sentence)}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under column heads, with a title above and a note below; the first `names`
    columns are names, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    names: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells under {len(self.columns)} heads.")


def print_table(table: Table) -> None:
    """Prints a table; one wider than the terminal is split, the first column repeated."""
    # A file or pipe has no width to keep to.
    console = Console() if Console().is_terminal else Console(width=WIDTH_OFF_TERMINAL)
    for part, columns in enumerate(_parts(table, console.width)):
        title = _text(table.title if not part else f"{table.title}, continued", style="bold")
        shown = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index in columns:
            shown.add_column(
                _text(table.columns[index]),
                justify="right" if index >= table.names else "left",
                overflow="fold",
                # Names may wrap, figures never.
                min_width=_width(table, index) if index >= table.names else None,
            )
        for row in table.rows:
            cells = (_cell(table, row, index) for index in columns)
            shown.add_row(*map(_text, cells))
        console.print(shown)
    if table.note:
        console.print(_text(table.note, style="dim"))


def _text(text: str, style: str = "") -> Text:
    return Text(visible(text), style=style)


def _cell(table: Table, row: Sequence[str], index: int) -> str:
    """A cell's text; long names are shortened."""
    return shortened(row[index]) if index < table.names else row[index]


def shortened(name: str, most: int = _MOST_OF_A_NAME) -> str:
    """A name with its middle cut out if it is longer than `most` characters."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}"


def _parts(table: Table, width: int) -> Iterator[list[int]]:
    """Column indices of each part, the first column in all of them."""
    widths = [_PADDING + _width(table, index) for index in range(len(table.columns))]
    part, used = [0], _EDGES + widths[0]
    for index in range(1, len(widths)):
        if len(part) > 1 and used + widths[index] > width:
            yield part
            part, used = [0], _EDGES + widths[0]
        part.append(index)
        used += widths[index]
    yield part


def _width(table: Table, index: int) -> int:
    """A column's minimum width: a head may wrap between words, a cell may not."""
    cells = (_cell(table, row, index) for row in table.rows)
    words = table.columns[index].split() if index else [table.columns[index]]
    return max(_text(text).cell_len for text in [*words, *cells, ""])


class ProgressBar:
    """A context that shows progress: a bar on a terminal, an occasional line elsewhere.

    Rates and the time left are measured from the first update, to leave out compilation. `done`
    counts what an earlier process did; a rate is shown only with a `unit` ("rows").
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "") -> None:
        self._title, self._total, self._done, self._unit = title, total, done, unit
        self._lines = self._lines_due()
        self._first: tuple[float, int] | None = None
        console = Console()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(visible(title), total=total, completed=done, status="")

    def add(self, count: int = 1, status: str = "") -> None:
        """Advances by `count`."""
        self.update(self._done + count, status)

    def update(self, done: int, status: str = "") -> None:
        """Sets the amount done, and the text after the bar."""
        self._done = done
        shown = "  ".join(text for text in (visible(status), *self._pace()) if text)
        self._bar.update(self._task, completed=self._done, status=shown)
        if self._bar.disable and self._lines_due() > self._lines:
            self._lines = self._lines_due()
            self.say(f"{self._done:,}/{self._total:,} {self._unit}".rstrip() + f"  {shown}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        line = Text(visible(f"[{self._title}] {text}"))
        self._bar.console.print(line, soft_wrap=True)

    def _pace(self) -> Iterator[str]:
        now = time.monotonic()
        since, before = self._first = self._first or (now, self._done)
        if self._done == before or now == since:
            return
        rate = (self._done - before) / (now - since)
        if self._unit:
            yield f"{rate:,.0f} {self._unit}/s"
        yield f"{datetime.timedelta(seconds=round((self._total - self._done) / rate))} left"

    def _lines_due(self) -> int:
        return self._done * _LINES // max(self._total, 1)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
