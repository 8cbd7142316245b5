"""Tables on the terminal: whole cells, whatever the width."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.reporting import terminal
from salt_jax.reporting.tables import Table
from salt_jax.reporting.terminal import print_table


def wide(columns: int) -> Table:
    heads = ("subset", "held-out tokens", *(f"arm number {n}" for n in range(columns)))
    rows = tuple(
        (f"subset {row}", "3,072,000", *(f"{row}.{n:03} / 33.{n:02}%" for n in range(columns)))
        for row in range(3)
    )
    return Table("By subset", heads, rows, "A note.")


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(0, 40), width=st.integers(30, 200))
def test_every_column_is_in_one_part_that_is_not_too_wide(columns: int, width: int) -> None:
    table = wide(columns)
    parts = list(terminal._parts(table, width))
    assert all(part[0] == 0 for part in parts)
    assert [index for part in parts for index in part[1:]] == [*range(1, len(table.columns))]
    for part in parts:
        needed = 1 + sum(3 + terminal._width(table, index) for index in part)
        assert needed <= width or len(part) == 2
    for part, following in itertools.pairwise(parts):
        needed = 1 + sum(3 + terminal._width(table, index) for index in [*part, following[1]])
        assert needed > width, "the next column had room here"


def test_no_cell_of_a_wide_table_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    table = wide(30)
    print_table(table)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= terminal.WIDTH_OFF_TERMINAL
    for row in table.rows:
        assert all(cell in printed for cell in row)
        assert sum(line.strip().startswith(row[0]) for line in lines) == printed.count("By subset")
    assert "By subset, continued" in printed
    assert printed.count("A note.") == 1
    print_table(wide(2))
    assert "continued" not in capsys.readouterr().out
