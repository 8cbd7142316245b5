"""Commands that cannot be right, VERB.txt for each verb, and what each is answered by.

A `$` line is typed in the folder `material`, with --output_dir=out where it has none; of the line
below it all parts between … stand in this order in the one sentence that stderr has: the setting,
the file or the value that is wrong. NAME = WORDS makes $NAME stand for words, <newline>, <long>
and <byte> are what no keyboard gives. The exit code is 2, and nothing is written.
"""

import pathlib
import re
import shlex
import shutil
import string
from collections.abc import Iterator

import pytest

from salt_jax.cli.command_line import verbs
from salt_jax.main import main

TABLES = sorted(pathlib.Path(__file__).parent.glob("*.txt"))
TYPED = {"<newline>": "\n", "<long>": "x" * 5000, "<byte>": "\udcff"}

# What only someone who reads the code can make sense of.
INTERNAL = re.compile(r"configurable|config string|collections|object at 0x|Traceback|salt_jax\.")


def cases(table: pathlib.Path) -> Iterator[tuple[str, str]]:
    """A table's commands and answers, as they are written."""
    text = table.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    for line, answer in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("$ salt "):
            yield line.removeprefix("$ salt "), answer


def words(command: str, table: pathlib.Path) -> list[str]:
    """What a command's line stands for."""
    names = dict(re.findall(r"^([A-Z]+) = (.*)$", table.read_text(encoding="utf-8"), re.M))
    typed = shlex.split(string.Template(command).substitute(names))
    for name, meaning in TYPED.items():
        typed = [word.replace(name, meaning) for word in typed]
    has_folder = any(word.startswith("--output_dir=") for word in typed)
    return typed if has_folder else [*typed, "--output_dir=out"]


def tree(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with what changes when it does."""
    states = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def faults(code: int, said: str, answer: str) -> Iterator[str]:
    """What is wrong with an exit code and what stderr has."""
    if code != 2:
        yield f"exit code {code}"
    if not re.fullmatch(r"salt: .*\.\n", said) or INTERNAL.search(said):
        yield "no plain sentence"
    parts = [re.escape(part.strip()) for part in answer.split("…")]
    if not answer.strip(" …") or not re.search(".*".join(parts), said):
        yield f"not {answer!r}"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"salt {table.stem}")
def test_is_refused_in_one_sentence_and_nothing_is_written(
    table: pathlib.Path,
    material: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(material)
    before, wrong = tree(material), []
    for command, answer in cases(table):
        capsys.readouterr()
        code = main(words(command, table))
        said = capsys.readouterr().err
        found = [
            *faults(code, said, answer),
            *["something was written"] * (tree(material) != before),
        ]
        shutil.rmtree(material / "out", ignore_errors=True)  # one failure is not to be many
        if found:
            wrong.append(f"$ salt {command}\n{said}{', '.join(found)}")
    assert not wrong, "\n\n".join(wrong)


def test_every_verb_has_a_table() -> None:
    assert [table.stem for table in TABLES] == verbs()
    sizes = {table.stem: len(list(cases(table))) for table in TABLES}
    assert min(sizes.values()) >= 10, sizes
    assert sum(sizes.values()) >= 100, sizes
