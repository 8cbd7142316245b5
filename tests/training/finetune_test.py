"""Fine-tuning: responses' loss falls, packed or not it is the same, and a teacher teaches them."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from salt_jax.commands.prepare import prepare
from salt_jax.data.features import make_row
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill import losses, schedules
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.models.decoder import DecoderConfig
from salt_jax.preparation.templates import Template
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import find_model
from salt_jax.training.evaluation import Evaluator
from salt_jax.training.partitioning import MeshConfig
from tests.run_settings import prepare_settings
from tests.written_cache import write_rows

STUDENT = DecoderConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=64)
TEACHER = DecoderConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_length=64)
TEMPLATE = Template("Q: {question}\nA:", " {answer}")
Run = Callable[..., pathlib.Path]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> PackedCache:
    """Answers that follow from their questions, with held-out ones."""
    folder = tmp_path_factory.mktemp("examples")
    rows = [{"question": f"after {n}", "answer": f"comes {n + 1} of {n % 3}"} for n in range(90)]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = TextFiles(
        train=str(folder / "all.jsonl"),
        validation_fraction=0.2,
        test_fraction=0.1,
        template=TEMPLATE,
    )
    settings = prepare_settings(
        task=files,
        vocabulary=ByteVocabulary(),
        sequence_length=64,
        packing="whole_documents",
        long_documents="drop",
        workers=1,
    )
    prepare(RunFolder(folder / "cache", "prepare"), **settings)
    return PackedCache.open(folder / "cache")


def _quality(run: pathlib.Path, cache: PackedCache, split: str) -> float:
    """The model's nats per trained-on token."""
    model, mesh = find_model(run, None, "model"), MeshConfig().make()
    evaluator = Evaluator(model.config, cache, split, 8, mesh)
    return evaluator(model.load_params(mesh)).whole.log_perplexity


def _metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(run_train: Run) -> pathlib.Path:
    """Pre-trained on other text with the same vocabulary, and as if it had been taken in."""
    run = run_train(model=STUDENT, steps=8)
    (run / "tokenizer").mkdir()
    (run / "tokenizer/chat_template.jinja").write_text("{{ messages }}")
    return run


def test_fine_tuning_lowers_the_loss_of_held_out_responses(
    trained: pathlib.Path, examples: PackedCache, tmp_path: pathlib.Path
) -> None:
    """The verbs from the command line: train from a run without its model's file, then evaluate."""
    command = ["train", "--gin_file=runs/finetune.gin", "--gin_file=methods/finetune.gin"]
    command += [f"--cache={examples.path}", f"--initial={trained}", "--steps=30"]
    command += ["--batch_size=8", "--gin.LEARNING_RATE=5e-3", "--gin.EVALUATE_EVERY=10"]
    assert main([*command, f"--output_dir={tmp_path}/tuned"]) == 0
    before = _quality(trained, examples, "validation")
    after = _quality(tmp_path / "tuned", examples, "validation")
    assert after < before - 1
    evaluations = [line for line in _metrics(tmp_path / "tuned") if line.get("kind") == "eval"]
    assert evaluations[-1]["log_perplexity"] == pytest.approx(after, rel=1e-5)
    assert evaluations[-1]["evaluated_tokens"] == examples.split("validation").info["tokens"]
    flags = [f"--model={tmp_path}/tuned", f"--cache={examples.path}"]
    assert main(["evaluate", *flags, f"--output_dir={tmp_path}/test"]) == 0
    summary = json.loads((tmp_path / "test/summary.json").read_text())
    assert summary["log_perplexity"] == pytest.approx(
        _quality(tmp_path / "tuned", examples, "test"), rel=1e-5
    )
    tuned = find_model(tmp_path / "tuned", None, "model")
    assert tuned.config == find_model(trained, None, "model").config
    assert tuned.load_vocabulary() == ByteVocabulary()
    # What goes out of it has the template of the model that it started from.
    assert (tmp_path / "tuned/tokenizer/chat_template.jinja").read_text() == "{{ messages }}"


def test_the_shape_must_come_from_somewhere(
    run_train: Run, trained: pathlib.Path, examples: PackedCache, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError, match=r"model is not set, .* or --initial=RUN\.$"):
        run_train(tmp_path / "out", model=None, cache=str(examples.path))
    with pytest.raises(InputError, match="give the student the same shape, or leave"):
        run_train(tmp_path / "out", model=TEACHER, cache=str(examples.path), initial=str(trained))
    assert not (tmp_path / "out").exists()


def test_packed_and_unpacked_examples_have_the_same_loss(
    trained: pathlib.Path, examples: PackedCache, tmp_path: pathlib.Path
) -> None:
    packed = examples.split("train")
    rows = []
    for row in packed:
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            inside_L = row["segment_ids"] == segment
            padding = (0, 64 - int(inside_L.sum()))
            targets, weights = (
                np.pad(row[name][inside_L], padding) for name in ("targets", "loss_weights")
            )
            rows.append(make_row(targets, weights, np.pad(inside_L[inside_L], padding)))
    write_rows(tmp_path, {"train": rows}, vocabulary=ByteVocabulary(), sequence_length=64)
    assert len(rows) > len(packed)
    alone = _quality(trained, PackedCache.open(tmp_path), "train")
    assert alone == pytest.approx(_quality(trained, examples, "train"), rel=1e-5)


def test_a_teacher_teaches_responses_alone(
    run_train: Run, trained: pathlib.Path, slm: pathlib.Path, examples: PackedCache
) -> None:
    """One step of 8 whole epochs: its means are those of both models' evaluations,
    over the tokens with weight."""
    omega = 0.6
    run = run_train(
        model=None,
        cache=str(examples.path),
        initial=str(trained),
        teacher=str(slm),
        schedule=schedules.Step(omega, n_kd=1),
        loss=losses.LossConfig(teacher_temperature=1.0),
        batch_size=8 * len(examples.split("train")),
        steps=2,
    )
    first = next(line for line in _metrics(run) if line.get("kind") == "train")
    assert first["teacher_hard"] == pytest.approx(_quality(slm, examples, "train"), rel=1e-4)
    assert first["log_perplexity"] == pytest.approx(_quality(trained, examples, "train"), rel=1e-4)
    expected = (1 - omega) * first["log_perplexity"] + omega * first["soft_loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    second = [line for line in _metrics(run) if line.get("kind") == "train"][1]
    assert "teacher_hard" not in second
