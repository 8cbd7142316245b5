"""The reader of stdout goes away: every verb finishes its files all the same."""

import json
import pathlib
from collections.abc import Callable

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main
from tests.broken_streams import broken
from tests.cases.small_model import training


@pytest.mark.parametrize("lost", [(1,), (2,), (1, 2)])
def test_training_and_generating_without_a_reader(
    case: Callable[[str], pathlib.Path],
    cache: PackedCache,
    tmp_path: pathlib.Path,
    lost: tuple[int, ...],
) -> None:
    prompts, model, out = case("pipe_closed") / "prompts.txt", tmp_path / "m", tmp_path / "out"
    said = tmp_path / "said"
    generate = ["generate", f"--model={model}", f"--prompts={prompts}", "--max_new_tokens=2"]
    with broken(*lost, said=said):
        assert main(training(cache, model)) == 0
    assert (model / "summary.json").exists()
    assert len((model / "metrics.jsonl").read_text().splitlines()) == 5
    with broken(*lost, said=said):
        assert main([*generate, f"--output_dir={out}"]) == 0
    made = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in made] == prompts.read_text().splitlines()
    assert json.loads((out / "summary.json").read_text())["prompts"] == len(made)
    if lost == (1,):
        lines = said.read_text().splitlines()
        assert [line.partition(" (")[0] for line in lines] == [
            "salt: stdout takes nothing more"
        ] * 2
