"""Tokenizers that draw merges by lot, lose characters, or have no unknown token."""

import json
import pathlib
from collections.abc import Callable

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main

Case = Callable[[str], pathlib.Path]


def _prepare(folder: pathlib.Path, tokenizer: str, text: str, out: str, *flags: str) -> int:
    return main(
        [
            *("prepare", f"--gin_file={folder / 'hf.gin'}", "--workers=1"),
            f"--gin.TEXT='{folder / text}'",
            f"--gin.TOK='{folder / tokenizer}'",
            f"--output_dir={folder / out}",
            *flags,
        ]
    )


def test_bpe_dropout_gives_one_cache(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("tokenizers")
    for out in ("one", "two"):
        assert _prepare(folder, "dropout.json", "base.jsonl", out) == 0
        assert capsys.readouterr().out.count("BPE dropout 0.3") == 1
    one, two = (PackedCache.open(folder / out) for out in ("one", "two"))
    assert one.digest == two.digest


def test_a_bpe_without_an_unknown_token_loses_nothing_unsaid(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = case("tokenizers")
    assert _prepare(folder, "nounk.json", "u.jsonl", "out") == 2
    assert "neither a piece nor an unknown token for" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert _prepare(folder, "nounk.json", "u.jsonl", "out", "--drop_unknown=True") == 0
    assert "Dropped 590 characters that the vocabulary has no id for." in capsys.readouterr().out
    assert json.loads((folder / "out" / "summary.json").read_text())["lost_characters"] == 590
    assert _prepare(folder, "nounk.json", "u.jsonl", "out") == 2
    assert "drop_unknown was True and is now False" in capsys.readouterr().err
    assert _prepare(folder, "nounk.json", "base.jsonl", "ascii") == 0
    assert "Left out" not in capsys.readouterr().out


def test_no_unknown_token_is_one_sentence(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("tokenizers")
    pieces = [["<|endoftext|>", 0.0], *([letter, -2.0] for letter in "▁abdeghilmnorstuvw.")]
    unigram = json.loads((folder / "wl.json").read_text())
    unigram["model"] = {"type": "Unigram", "unk_id": None, "vocab": pieces}
    (folder / "ug.json").write_text(json.dumps(unigram))
    for tokenizer in ("wl.json", "ug.json"):
        assert _prepare(folder, tokenizer, "u.jsonl", "out") == 2
        said = capsys.readouterr().err
        assert said.startswith("salt: The tokenizer cannot encode a text (")
        assert said.count("\n") == 1
        assert not (folder / "out").exists()
