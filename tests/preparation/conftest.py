"""A corpus of several files, and what a finished cache's files hold."""

import hashlib
import json
import pathlib
from collections.abc import Callable

import pytest

MakeCorpus = Callable[..., pathlib.Path]


@pytest.fixture
def make_corpus(tmp_path: pathlib.Path) -> MakeCorpus:
    """Makes FOLDER/train/0.jsonl … and val.jsonl: texts of many lengths, some of them repeated."""

    def make(files: int = 4, documents: int = 40, name: str = "corpus") -> pathlib.Path:
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        for number in range(files):
            texts = [_text(number, index) for index in range(documents)]
            # A text of the file before, one of the file itself, and one of validation.
            texts += [_text(max(number - 1, 0), 3), texts[5], _text(files, 0)]
            _write(folder / f"train/{number}.jsonl", texts)
        _write(folder / "val.jsonl", [_text(files, index) for index in range(10)])
        return folder

    return make


def _text(number: int, index: int) -> str:
    words = hashlib.sha256(f"{number}/{index}".encode()).hexdigest()
    return f"{number} {index}: " + " ".join([words[:8], words[8:20]] * (1 + index % 7))


def _write(path: pathlib.Path, texts: list[str]) -> None:
    rows = [{"text": text, "subset": ["code", "prose"][len(text) % 2]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_of(folder: pathlib.Path) -> dict[str, str]:
    """Digests of a cache's files, without those that hold times."""
    times = {"run.json", "summary.json", "config.gin"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in times
    }
