"""Tables on the terminal: the same ones as on the page."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from salt_jax.reporting.tables import Table

WIDTH_OFF_TERMINAL = 120


def print_table(table: Table) -> None:
    """Shows a table; names are shown as they are, never as markup."""
    # Into a file or a pipe there is no width to keep to, and folded figures are hard to read.
    console = Console() if Console().is_terminal else Console(width=WIDTH_OFF_TERMINAL)
    shown = TerminalTable(
        title=Text(table.title, style="bold"), title_justify="left", box=SIMPLE_HEAD
    )
    for index, name in enumerate(table.columns):
        shown.add_column(Text(name), justify="right" if index else "left", no_wrap=not index)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    if table.note:
        console.print(Text(table.note, style="dim"))
