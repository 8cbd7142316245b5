"""Names in square brackets, and with what steers a terminal, are printed as they are."""

import json
import pathlib
from collections.abc import Callable

import pytest

from salt_jax.main import main
from tests.cases.small_model import training

SHOWN = {"tag": "[/INST] chats", "tag2": "[code]", "ctl": r"two\nlines\t\x1b[31mred"}


@pytest.mark.parametrize("name", SHOWN)
def test_prepare_and_evaluate_show_subsets_as_they_are(
    case: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    file = case("subset_markup") / f"{name}.jsonl"
    prepare = ["prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{file}'", "--show=1"]
    prepare += ["--gin.VOCABULARY_SIZE=300", "--gin.SEQUENCE_LENGTH=32", "--workers=1"]
    prepare += ["--gin.text_files.TextFiles.test_fraction=0.1"]
    cache, model, out = (tmp_path / folder for folder in ("cache", "[/b] m", "out"))
    assert main([*prepare, f"--output_dir={cache}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"    {SHOWN[name]} ") == 3
    assert "\x1b" not in printed
    assert main([*training(cache, model), "--arm=[/red]"]) == 0
    assert "[[/red]] step 4: validation" in capsys.readouterr().out
    evaluate = ["evaluate", f"--model={model}", f"--cache={cache}", f"--output_dir={out}"]
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert str(model).split()[0] in printed.replace("\n", "")  # a long title is folded
    assert f"  {SHOWN[name]} " in printed
    assert "\x1b" not in printed
    subsets = json.loads((out / "summary.json").read_text())["by_subset"]
    assert {json.dumps(subset)[1:-1].replace("u001b", "x1b") for subset in subsets} >= {SHOWN[name]}
