"""Commands given again on what they have finished: with other settings that change no result, and
with one that does."""

import importlib
import inspect
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from salt_jax.cli.command_line import verbs
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores
from salt_jax.main import main

TRAIN = (
    *("--gin_file=runs/pretrain.gin", "--gin_file=methods/baseline.gin", "--steps=2"),
    *("--gin_file=models/slm_smoke.gin", "--gin.LEARNING_RATE=1e-3", "--batch_size=16"),
    *("--gin.decoder.DecoderConfig.mlp_dim=32", "--gin.decoder.DecoderConfig.embed_dim=16"),
    *("--gin.decoder.DecoderConfig.num_layers=2", "--gin.decoder.DecoderConfig.num_heads=2"),
    "--compilation_cache=",
)
MESH = ("--gin_file=hardware/fsdp.gin", "--gin.partitioning.MeshConfig.data=2")
AGAIN = {
    "train": (
        [*TRAIN, "--cache={cache}"],
        ["--log_every=1", "--microbatches=2", "--hang_seconds=9", *MESH],
        ("--seed=3", "config.TrainConfig.seed was 0 and is now 3"),
    ),
    "evaluate": (
        ["--model={model}", "--cache={cache}", "--compilation_cache="],
        [
            "--batch_size=8",
            "--chunk_tokens=64",
            "--save_samples=True",
            *MESH,
        ],
        ("--rows=3", "held_out.HeldOut.rows was None and is now 3"),
    ),
    "select": (
        ["--cache={cache}", "--scores={scores}", "--gin_file=methods/top_rows.gin", "--gin.ROWS=5"],
        ["--allow_nan=True"],
        ("--statistic=mean", "statistic was 'median' and is now 'mean'"),
    ),
    "convert": (
        ["--model={model}"],
        ["--max_shard_bytes=20000"],
        ("--dtype=bfloat16", "dtype was None and is now 'bfloat16'"),
    ),
    "report": (["{model}"], ["--title=Another"], None),
    "generate": (["--model={model}", "--prompt=a", "--max_new_tokens=3"], ["--batch_size=2"], None),
}


@pytest.fixture
def folders(
    tiny_run: pathlib.Path,
    cache: PackedCache,
    write_scores: Callable[..., RowScores],
    tmp_path: pathlib.Path,
) -> dict[str, str]:
    scores = tmp_path / "scores"
    write_scores(scores, np.arange(len(cache.split("train"))), cache_digest=cache.digest)
    return {"model": str(tiny_run), "cache": str(cache.path), "scores": str(scores)}


def checkpoints(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")}


@pytest.mark.parametrize("verb", AGAIN)
def test_what_changes_no_result_may_be_another(
    verb: str, folders: dict[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, harmless, harmful = AGAIN[verb]
    typed = [verb, *(flag.format(**folders) for flag in flags), f"--output_dir={tmp_path / 'out'}"]
    assert main(typed) == 0
    before = checkpoints(tmp_path / "out")
    for more in ([], harmless, []):
        assert main([*typed, *more]) == 0, capsys.readouterr().err
    if harmful is None:  # it does its work again, whatever is asked
        return
    assert checkpoints(tmp_path / "out") == before, "trained again"
    assert main([*typed, harmful[0]]) == 2
    said = capsys.readouterr().err
    assert f"holds a run with another configuration: {harmful[1]}" in said


@pytest.mark.parametrize("verb", verbs())
def test_settings_that_change_no_result_are_there(verb: str) -> None:
    """Those of a verb's own are its own, by their names."""
    module = importlib.import_module(f"salt_jax.commands.{verb}")
    settings = inspect.signature(getattr(module, verb)).parameters
    names = [*module.VERB.changes_no_result, *getattr(module, "MAY_CHANGE", ())]
    own = [name.rpartition(".") for name in names]
    assert [setting for owner, _, setting in own if owner == verb and setting not in settings] == []
