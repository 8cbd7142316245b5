"""One tokenizer, saved by two versions of transformers: one to every verb."""

import pathlib
from collections.abc import Callable

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import load_vocabulary
from salt_jax.main import main
from salt_jax.training.checkpoints import find_model


def test_saved_again_is_the_same_tokenizer(
    case: Callable[[str], pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = case("resaved_tokenizer")
    runs = {"old": folder / "run", "new": folder / "other"}
    for name, run in runs.items():
        assert main(["convert", f"--huggingface={folder / name}", f"--output_dir={run}"]) == 0
    old, new = (load_vocabulary(run) for run in runs.values())
    assert old.fingerprint != new.fingerprint
    assert old == new
    # Two steps of one model, of which one was saved again.
    step = ["convert", f"--huggingface={folder / 'new'}", "--step=7"]
    assert main([*step, f"--output_dir={runs['old']}"]) == 0
    for saved in (find_model(runs["old"], number, "model") for number in (0, 7)):
        assert saved.load_vocabulary() == old
    # A cache made with the one is read by the other's model, and mixed with the other's cache.
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "harbor {n} candle {n * n}"}}\n' for n in range(200)))
    gin = folder / "text.gin"
    gin.write_text(
        "from __gin__ import dynamic_registration\n"
        "from salt_jax.commands import prepare\n"
        "from salt_jax.data import vocabularies\n"
        "from salt_jax.preparation import packing\n"
        "from salt_jax.preparation import text_files\n"
        "prepare.prepare.task = @text_files.TextFiles()\n"
        "prepare.prepare.vocabulary = @vocabularies.load_vocabulary()\n"
        "packing.Packing.sequence_length = 32\n"
        f"text_files.TextFiles.train = '{text}'\n"
        "text_files.TextFiles.validation_fraction = 0.1\n"
        "vocabularies.load_vocabulary.folder = %MODEL\n"
    )
    for name, run in runs.items():
        model = f"--gin.MODEL='{run}'"
        cache = f"--output_dir={folder / f'{name}_cache'}"
        assert main(["prepare", f"--gin_file={gin}", "--workers=1", model, cache]) == 0
    caches = {name: PackedCache.open(folder / f"{name}_cache") for name in runs}
    assert find_model(runs["new"], None, "scorer", caches["old"]).step == 0
    assert find_model(runs["old"], None, "teacher", caches["new"]).step == 7
    capsys.readouterr()
    trained = [
        *("train", "--gin_file=runs/finetune.gin", "--gin_file=methods/finetune.gin"),
        *(f"--initial={runs['new']}", f"--cache={folder / 'old_cache'}"),
        *(f"--cache={folder / 'new_cache'}", "--steps=2", f"--output_dir={folder / 'trained'}"),
    ]
    assert main([*trained, "--batch_size=8"]) == 0, capsys.readouterr().err
