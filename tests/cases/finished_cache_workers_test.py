"""Settings that a finished cache would be the same with do not make it another."""

import json

import pytest

from salt_jax.main import main


@pytest.fixture
def typed(tmp_path):
    rows = [json.dumps({"text": f"document {number} of salt"}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    return [
        *("prepare", "--gin_file=data/text.gin", "--sequence_length=32"),
        *("--gin.VOCABULARY_SIZE=300", f"--gin.TEXT='{tmp_path}/*.jsonl'"),
        f"--output_dir={tmp_path}/cache",
    ]


def test_on_other_workers_nothing_is_done(typed, tmp_path, capsys):
    assert main([*typed, "--workers=1", "--show=1"]) == 0
    made = (tmp_path / "cache/manifest.json").stat()
    for changed in (
        *(["--workers=2"], [], ["--skip_broken_lines=True"]),
        *(["--drop_unknown=True"], ["--parse_special=False"]),
    ):
        assert main([*typed, *changed]) == 0, capsys.readouterr().err
        assert "is finished already: nothing was prepared" in capsys.readouterr().out
    assert (tmp_path / "cache/manifest.json").stat() == made
    assert main([*typed, "--seed=1"]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err


def test_broken_lines_that_were_passed_over_are_still_refused(typed, tmp_path, capsys):
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n{")
    typed = [*typed, "--workers=1"]
    assert main([*typed, "--skip_broken_lines=True"]) == 0
    assert main(typed) == 2
    assert "skip_broken_lines was True and is now False" in capsys.readouterr().err
    assert main([*typed, "--skip_broken_lines=True"]) == 0
