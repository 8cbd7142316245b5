"""`salt evaluate` by responses: the model's own words, with scores, from real checkpoints."""

import dataclasses
import json
import pathlib

import pytest

from salt_jax.commands.evaluate import evaluate
from salt_jax.commands.prepare import prepare
from salt_jax.commands.train import train
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill import losses, schedules
from salt_jax.errors import InputError
from salt_jax.evaluation.answers import RequestLog
from salt_jax.evaluation.held_out import HeldOut
from salt_jax.evaluation.responses import Responses
from salt_jax.inference.generation import Sampling
from salt_jax.models.decoder import DecoderConfig
from salt_jax.preparation.templates import Template
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.config import Devices
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW
from tests.run_settings import prepare_settings, train_config

TEMPLATE = Template("Q: {question}\nA:", " {answer}")
# A model of this size learns them by heart within the steps below.
EXAMPLES = [
    {"question": "one", "answer": "so #### 1,000"},
    {"question": "two", "answer": "thus #### -2"},
    {"question": "three", "answer": "it is #### 3"},
]


def _files(path: pathlib.Path, examples=EXAMPLES) -> TextFiles:
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    return TextFiles(train=str(path), template=TEMPLATE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run that knows the examples by heart."""
    folder = tmp_path_factory.mktemp("model")
    files = _files(folder / "train.jsonl")
    files = dataclasses.replace(files, validation=_other(folder / "validation.jsonl"))
    settings = prepare_settings(
        task=files,
        vocabulary=ByteVocabulary(),
        sequence_length=32,
        packing="whole_documents",
        long_documents="drop",
        workers=1,
    )
    prepare(RunFolder(folder / "cache", "prepare"), **settings)
    train(
        RunFolder(folder / "run", "train"),
        config=train_config(
            model=DecoderConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=48),
            cache=str(folder / "cache"),
            steps=150,
            batch_size=8,
            optimizer=AdamW(WarmupCosine(1e-2, warmup_steps=5)),
            schedule=schedules.NoDistillation(),
            loss=losses.LossConfig(),
            arm="test",
            checkpoints=CheckpointConfig(save_every=0),
            log_every=50,
            compilation_cache="",
        ),
    )
    return folder / "run"


def _other(path: pathlib.Path) -> tuple[str]:
    return _files(path, [{"question": "four", "answer": "#### 4"}]).train


def _evaluate(model, folder, responses, **changes):
    quiet = {"devices": Devices(compilation_cache="")}
    settings = {"model": str(model), "responses": responses, **quiet, **changes}
    evaluate(RunFolder(folder, "evaluate"), **settings)
    lines = (folder / "responses.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"]["step"] == 150
    return summary["responses"], list(map(json.loads, lines))


def test_a_model_that_knows_its_examples(model, tmp_path, capsys):
    responses = Responses(_files(tmp_path / "t.jsonl"), "number", max_new_tokens=20)
    summary, answers = _evaluate(model, tmp_path / "out", responses)
    assert [a["prompt"] for a in answers] == ["Q: one\nA:", "Q: two\nA:", "Q: three\nA:"]
    assert [a["generated"] for a in answers] == [f" {e['answer']}" for e in EXAMPLES]
    assert answers[0]["scores"] == {"exact_match": 1.0, "answered": 1.0}
    assert (summary["exact_match"], summary["answered"], summary["examples"]) == (1.0, 1.0, 3)
    assert (summary["metric"], summary["cut_prompts"]) == ("number", 0)
    assert "exact_match" in capsys.readouterr().out


def test_scores_are_means_over_examples(model, tmp_path):
    examples = [EXAMPLES[0], {**EXAMPLES[1], "answer": "thus #### 2"}]
    files = _files(tmp_path / "t.jsonl", examples)
    summary, answers = _evaluate(
        model, tmp_path / "out", Responses(files, "number", max_new_tokens=20)
    )
    assert [a["scores"]["exact_match"] for a in answers] == [1, 0]
    assert (summary["exact_match"], summary["answered"]) == (0.5, 1.0)
    summary, _ = _evaluate(model, tmp_path / "rouge", Responses(files, "rouge", max_new_tokens=20))
    assert 0.9 < summary["rouge1"] <= 1


def test_a_response_ends_before_a_stop_text(model, tmp_path):
    files = _files(tmp_path / "t.jsonl", EXAMPLES[:1])
    responses = Responses(files, "number", max_new_tokens=20, stop_texts=("#", "1"))
    summary, answers = _evaluate(model, tmp_path / "out", responses)
    assert answers[0]["generated"] == " so "
    assert summary["answered"] == 0


def test_a_response_has_no_more_tokens_than_it_may(model, tmp_path):
    responses = Responses(_files(tmp_path / "t.jsonl"), "number", max_new_tokens=3)
    _, answers = _evaluate(model, tmp_path / "out", responses)
    assert [a["generated"] for a in answers] == [" so", " th", " it"]


def test_a_prompt_that_leaves_no_room_loses_its_beginning_and_is_counted(model, tmp_path, capsys):
    long = {"question": "x" * 60 + " one", "answer": "#### 1"}
    files = _files(tmp_path / "t.jsonl", [long, *EXAMPLES])
    responses = Responses(files, "number", max_new_tokens=20)
    summary, answers = _evaluate(model, tmp_path / "out", responses)
    assert (summary["cut_prompts"], summary["examples"]) == (1, 4)
    assert answers[0]["prompt"] == f"Q: {'x' * 60} one\nA:"
    assert [a["scores"]["exact_match"] for a in answers[1:]] == [1, 1, 1]
    assert "1 prompts were too long and lost their beginning" in capsys.readouterr().out


def test_bad_settings_in_a_sentence(model, tmp_path):
    files = _files(tmp_path / "t.jsonl")
    with pytest.raises(InputError, match=r"metric is 'numbr' \(nearest: number\)"):
        Responses(files, "numbr")
    with pytest.raises(InputError, match="have no prompt"):
        Responses(dataclasses.replace(files, template=Template()), "label")
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        Responses(files, "number", max_new_tokens=0)
    with pytest.raises(InputError, match=r"One of Responses\.stop_texts is empty"):
        Responses(files, "number", stop_texts=("a", ""))
    with pytest.raises(InputError, match=r"max_new_tokens is 47 .* takes 48 tokens, prompt includ"):
        _evaluate(model, tmp_path / "out", Responses(files, "number", max_new_tokens=47))
    responses = Responses(_files(tmp_path / "empty.jsonl", []), "number", max_new_tokens=20)
    with pytest.raises(InputError, match="There are no examples in"):
        _evaluate(model, tmp_path / "out", responses)
    no_number = _files(tmp_path / "no.jsonl", [{"question": "a", "answer": "b"}])
    responses = Responses(no_number, "number", max_new_tokens=20)
    with pytest.raises(InputError, match="the reference ' b' has none"):
        _evaluate(model, tmp_path / "out", responses)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"^There is nothing to evaluate on: add --cache"):
        evaluate(RunFolder(tmp_path / "out", "evaluate"), model=str(model))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=2)], ids=["greedy", "drawn"])
def test_a_killed_run_makes_no_response_twice(model, tmp_path, monkeypatch, sampling):
    examples = [*EXAMPLES, {"question": "four", "answer": "#### 4"}, EXAMPLES[0], EXAMPLES[2]]
    files = _files(tmp_path / "t.jsonl", examples)
    responses = Responses(files, "number", max_new_tokens=9, sampling=sampling)
    _, straight = _evaluate(model, tmp_path / "straight", responses)
    add, made = RequestLog.add, []

    def stopped(self, answers):
        add(self, answers)
        made.extend(answers)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RequestLog, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(model, tmp_path / "killed", responses)
    assert not (tmp_path / "killed/summary.json").exists()
    _, answers = _evaluate(model, tmp_path / "killed", responses)
    assert answers == straight
    # Greedy, equal prompts have one response; by lot each has its own.
    assert len(made) == len({*made}) == (6 if sampling.temperature else 4)


def test_rows_and_responses_in_one_run(model, tmp_path, capsys):
    responses = Responses(_files(tmp_path / "t.jsonl"), "number", max_new_tokens=20)
    cache = str(model.parent / "cache")
    settings = {"held_out": HeldOut(cache, "validation")}
    means, _ = _evaluate(model, tmp_path / "out", responses, **settings)
    assert means["exact_match"] == 1
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["split"], summary["rows"]) == ("validation", 1)
    assert summary["bits_per_byte"] > 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "exact_match" in printed
