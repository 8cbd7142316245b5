"""What is printed: whole cells whatever the width, and nothing that steers the terminal."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax import terminal
from salt_jax.terminal import ProgressBar, Table, print_table, say, warn


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


HOSTILE = "[/INST] [code] \x1b[31mred\x1b[0m\a\r\u202eback"
SHOWN = r"[/INST] [code] \x1b[31mred\x1b[0m\x07\r\u202eback"


def test_text_of_anyones_is_printed_as_it_is_and_steers_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(f"{HOSTILE}\nand", "\ttabs, 全角\u3000spaces, नम\u200dस्ते")
    warn(f"{HOSTILE}\nand")
    print_table(Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, "1"),), HOSTILE))
    with ProgressBar(HOSTILE, 2) as bar:
        bar.say(HOSTILE)
        bar.update(1, HOSTILE)
    out, error = capsys.readouterr()
    assert f"{SHOWN}\\nand\n\ttabs, 全角\u3000spaces, नम\u200dस्ते\n" in out
    assert error == f"salt: {SHOWN}\\nand\n"
    assert out.count(SHOWN) == 1 + 4 + 2 * 2
    assert f"[{SHOWN}] 1/2  {SHOWN}\n" in out


def test_a_long_name_is_folded_and_its_figures_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    name = "".join(f"[{number}]" for number in range(100))
    print_table(Table("", ("subset", "tokens"), ((name, "3,072,000"),)))
    out = capsys.readouterr().out
    assert "3,072,000" in out
    assert name in "".join(out.replace("3,072,000", "").split())


def test_a_name_of_thousands_of_characters_takes_a_few_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(Table("", ("subset", "tokens"), (("a" * 10_000 + "z", "3,072,000"),)))
    out = capsys.readouterr().out
    assert "3,072,000" in out
    assert "…" in out
    assert "z" in out
    assert len(out.splitlines()) < 12


def test_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with ProgressBar("score", 1200, 200, unit="rows") as bar:
        for _ in range(100):
            bar.add(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[score] 240/1,200 rows  10 rows/s  0:01:36 left"
    assert len(lines) == 9
    assert lines[-1] == "[score] 1,200/1,200 rows  10 rows/s  0:00:00 left"


def test_what_was_done_before_is_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("arm", 4, 2) as bar:
        bar.update(3, "loss 1.0")
    assert capsys.readouterr().out == "[arm] 3/4  loss 1.0\n"
    with ProgressBar("nothing", 0):
        pass
