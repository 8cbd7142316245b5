"""stdout that has no word for what is printed: it shows `?`, and nothing fails."""

import json
import pathlib

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main
from tests.broken_streams import broken
from tests.cases.small_model import training


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_prepare_train_and_generate(
    cache: PackedCache, tmp_path: pathlib.Path, encoding: str
) -> None:
    text, said = tmp_path / "text.jsonl", tmp_path / "said"
    rows = [{"text": f"naïve water {n} → 水 " * 9, "subset": "水"} for n in range(99)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ["prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{text}'", "--workers=2"]
    prepare += ["--gin.VOCABULARY_SIZE=300", "--show=2", "--gin.SEQUENCE_LENGTH=32", "--shards=2"]
    model, prompt = tmp_path / "m", "naïve → 水"
    with broken(said=said, encoding=encoding):
        assert main([*prepare, f"--output_dir={tmp_path / 'cache'}"]) == 0
        assert main([*training(tmp_path / "cache", model), "--arm=→ï"]) == 0
        generate = ["generate", f"--model={model}", f"--prompt={prompt}", "--max_new_tokens=3"]
        assert main([*generate, f"--output_dir={tmp_path / 'texts'}"]) == 0
        assert main(["train", "--help"]) == 0
    printed = said.read_bytes().decode(encoding)
    assert prompt.encode(encoding, "replace").decode(encoding) in printed
    assert "?? train row 0 " in printed
    (made,) = (tmp_path / "texts" / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(made)["prompt"] == prompt
