"""Tables on the terminal: the same ones as on the page.

In: a Table. Out: it, printed; where it is wider than the terminal, in parts below one another, each
with the column that names the rows.
"""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from salt_jax.errors import visible
from salt_jax.reporting.tables import Table

WIDTH_OFF_TERMINAL = 120
_PADDING = 3  # of a cell, and what parts it from the next
_EDGES = 1  # of a table


def print_table(table: Table) -> None:
    """Shows a table; names are shown as they are, never as markup."""
    # Into a file or a pipe there is no width to keep to, and folded figures are hard to read.
    console = Console() if Console().is_terminal else Console(width=WIDTH_OFF_TERMINAL)
    for part, columns in enumerate(_parts(table, console.width)):
        title = _text(table.title if not part else f"{table.title}, continued", style="bold")
        shown = TerminalTable(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index in columns:
            name = _text(table.columns[index])
            shown.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in table.rows:
            shown.add_row(*(_text(row[index]) for index in columns))
        console.print(shown)
    if table.note:
        console.print(_text(table.note, style="dim"))


def _text(text: str, style: str = "") -> Text:
    return Text(visible(text), style=style)


def _parts(table: Table, width: int) -> Iterator[list[int]]:
    """The columns of each part, the first column in all of them."""
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
    """What a column needs: a head may be folded between its words, a cell may not."""
    words = table.columns[index].split() if index else [table.columns[index]]
    return max(_text(text).cell_len for text in [*words, *(row[index] for row in table.rows), ""])
