"""`salt transplant`: a teacher with another tokenizer, against the original's probabilities."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.data.input_pipeline import in_order
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.shared_pieces import SharedPieces, shared_pieces
from salt_jax.main import main
from salt_jax.models import decoder
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.partitioning import MeshConfig

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SMALL = ("--gin_file=runs/pretrain.gin", "--gin_file=models/slm_smoke.gin", "--num_layers=1")
SMALL = (*SMALL, "--embed_dim=32", "--num_heads=2", "--mlp_dim=32", "--compilation_cache=")
SMALL = (*SMALL, "--gin.LEARNING_RATE=1e-2", "--gin.WARMUP_STEPS=1", "--batch_size=8")


def salt(verb: str, *flags: str, to: pathlib.Path) -> pathlib.Path:
    assert main([verb, *flags, f"--output_dir={to}"]) == 0
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Caches of one text with 500 and 600 ids, and a model of the first."""
    folder = tmp_path_factory.mktemp("transplant")
    text = (
        "--gin_file=data/text.gin",
        f"--gin.TEXT='{DOCS}/method.md'",
        "--gin.SEQUENCE_LENGTH=32",
    )
    text += ("--gin.text_files.TextFiles.piece_bytes=500", "--workers=1")
    text += ("--gin.text_files.TextFiles.validation_fraction=0.1",)
    for name, size in (("theirs", 500), ("ours", 600)):
        salt("prepare", *text, f"--gin.VOCABULARY_SIZE={size}", to=folder / name)
    method = ("--gin_file=methods/baseline.gin", f"--cache={folder / 'theirs'}", "--steps=4")
    salt("train", *SMALL, *method, to=folder / "model")
    return folder


@pytest.fixture(scope="module")
def teacher(folder: pathlib.Path) -> pathlib.Path:
    where = (f"--model={folder / 'model'}", f"--cache={folder / 'ours'}", "--least_shared=0")
    return salt("transplant", *where, "--rows=16", to=folder / "teacher")


@pytest.fixture(scope="module")
def batch(folder: pathlib.Path) -> dict[str, Any]:
    cache = PackedCache.open(folder / "ours")
    return dict(next(iter(in_order(cache.split("train"), 16, cache.start_id))))


def probabilities(saved: SavedModel, batch: dict[str, Any], inputs: np.ndarray) -> np.ndarray:
    """[B, L, V], in float64 from the logits on."""
    params = saved.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1]))
    hidden = decoder.hidden_states(saved.config, params, {**batch, "inputs": jnp.asarray(inputs)})
    head = decoder.head_kernel(params, saved.config)
    logits = np.asarray(decoder.logits(hidden, head, saved.config), np.float64)
    odds = np.exp(logits[..., : saved.config.vocab_size])
    return odds / odds.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def pieces(folder: pathlib.Path) -> SharedPieces:
    vocabulary = find_model(folder / "model", None, "model").load_vocabulary()
    return shared_pieces(PackedCache.open(folder / "ours").vocabulary, vocabulary)


def test_it_gives_shared_pieces_the_original_s_probability_renormalised(
    folder: pathlib.Path, teacher: pathlib.Path, batch: dict[str, Any], pieces: SharedPieces
) -> None:
    ids, shared = pieces
    original, new = find_model(folder / "model", None, "model"), find_model(teacher, None, "model")
    theirs = probabilities(original, batch, ids[batch["inputs"]])[..., ids[shared]]
    ours = probabilities(new, batch, batch["inputs"])
    share = theirs.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours[..., shared], theirs / share, rtol=1e-4)
    assert not ours[..., ~shared].any()

    found = json.loads((teacher / "summary.json").read_text())
    counts = batch["loss_weights"] > 0
    known = counts & shared[batch["targets"]]
    assert found["shared_probability"] == pytest.approx(share[counts].mean(), rel=1e-5)
    assert found["shared_tokens"] == pytest.approx(known.sum() / counts.sum())
    of_target = np.take_along_axis(ours, batch["targets"][..., None], -1)[..., 0]
    assert found["loss"] == pytest.approx(-np.log(of_target[known]).mean(), rel=1e-5)
    assert 0.1 < found["shared_probability"] < 0.999
    assert 0.1 < found["shared_tokens"] < 0.999


def test_it_teaches_by_its_likeliest_tokens(
    folder: pathlib.Path, teacher: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student = (*SMALL, f"--cache={folder / 'ours'}", "--steps=3", "--gin.N_KD=2")
    student += ("--gin.TEACHER_TEMPERATURE=1.0",)
    taught = (*student, f"--teacher={teacher}", "--gin_file=methods/salt_top_k.gin")
    run = salt("train", *taught, "--gin.TOP_K=20", to=folder / "taught")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("teacher_loss", line.get("train/teacher_loss", 1)) > 0 for line in lines)
    led = (*SMALL, f"--cache={folder / 'ours'}", "--steps=3", "--gin.STOP=2", "--gin.LAYER=1")
    salt("train", *led, "--gin_file=methods/let.gin", f"--teacher={teacher}", to=folder / "led")
    every = (*student, f"--teacher={teacher}", "--gin_file=methods/salt.gin")
    assert main(["train", *every, f"--output_dir={folder / 'every'}"]) == 2
    assert "methods/salt_top_k.gin" in capfd.readouterr().err
    assert not (folder / "every").exists()
    stored = (f"--scorer={teacher}", f"--cache={folder / 'ours'}", "--soft_labels=20")
    salt("score", *stored, "--soft_label_temperature=1.0", to=folder / "labels")


def test_a_tokenizer_that_shares_too_little_is_refused(
    folder: pathlib.Path, teacher: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = [f"--model={folder / 'model'}", f"--cache={folder / 'ours'}", "--rows=16"]
    found = json.loads((teacher / "summary.json").read_text())
    between = (found["shared_probability"] + found["shared_tokens"]) / 2
    assert found["shared_probability"] < between < found["shared_tokens"]
    for least in ([], [f"--least_shared={between}"]):
        assert main(["transplant", *where, *least, f"--output_dir={folder / 'none'}"]) == 2
        assert "least_shared" in capfd.readouterr().err
        assert not (folder / "none").exists()
    again = [*where, "--least_shared=0", f"--output_dir={teacher}"]
    assert main(["transplant", *again]) == 0
    assert "nothing was done" in capfd.readouterr().out
    theirs = [again[0], f"--cache={folder / 'theirs'}", again[-1]]
    assert main(["transplant", *theirs]) == 2
    assert "another --output_dir" in capfd.readouterr().err
    twice = [f"--model={teacher}", where[1], f"--output_dir={folder / 'none'}"]
    assert main(["transplant", *twice]) == 2
    assert f"{folder / 'model'}" in capfd.readouterr().err


def test_with_its_own_vocabulary_it_loses_nothing(folder: pathlib.Path) -> None:
    where = (
        f"--model={folder / 'model'}",
        f"--cache={folder / 'theirs'}",
        "--rows=8",
        "--least_shared=0.5",
    )
    found = json.loads((salt("transplant", *where, to=folder / "own") / "summary.json").read_text())
    assert found["shared_tokens"] == 1.0
    # What is missing is that of the bytes that stand in for letters which have pieces.
    assert found["shared_probability"] > 0.5


def test_it_is_not_exported(
    folder: pathlib.Path, teacher: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No family has a bias of that kind."""
    assert main(["convert", f"--model={teacher}", f"--output_dir={folder / 'hf'}"]) == 2
    assert "absent_ids" in capfd.readouterr().err


def test_its_parameters_are_counted(teacher: pathlib.Path) -> None:
    saved: Any = find_model(teacher, None, "model")
    params = saved.load_params(MeshConfig(fsdp=1).make([jax.devices()[0]]))
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == saved.config.num_parameters
