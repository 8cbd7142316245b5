"""One exported model through lm-eval's own hf backend, and through ours."""

import json
import pathlib
from typing import Any

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.evaluation import harness, harness_tasks
from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.main import main
from salt_jax.training.checkpoints import find_model
from salt_jax.training.partitioning import MeshConfig

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which lm-eval's backend needs, isn't there")

IDS, ROWS = 290, 320
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
TEXT = " ".join(f"Number {n} comes after {n - 1}, and salt comes from the sea." for n in range(99))


def save_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == IDS
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(folder)


def run_and_export(folder: pathlib.Path, kind: str) -> tuple[pathlib.Path, pathlib.Path]:
    """A run of a random model, and what `salt convert` makes of it for transformers."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **CONFIGS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "source")
    save_tokenizer(folder / "source")
    run, export = folder / "run", folder / "export"
    assert main(["convert", f"--huggingface={folder / 'source'}", f"--output_dir={run}"]) == 0
    # Ids that pad the vocabulary count in their softmax and not in ours.
    flags = [f"--model={run}", "--drop_padding=True", f"--output_dir={export}"]
    assert main(["convert", *flags]) == 0
    return run, export


def write_tasks(folder: pathlib.Path) -> None:
    # Both parse the name of a special token, which a corpus doesn't.
    rows = [
        {
            "text": TEXT[at : at + 30 * n + 5] + "<|endoftext|> Salt" * (n % 3 == 1),
            "choices": [" the sea", " Number 7", " a mine"],
        }
        for n, at in enumerate(range(0, 800, 67))
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = {
        "task": "local_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    generate = {
        "task": "local_generate",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    for settings in (choice, rolling, generate):
        (folder / f"{settings['task']}.yaml").write_text(json.dumps({**common, **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_lm_eval_s_own_backend_says_the_same(kind: str, tmp_path: pathlib.Path) -> None:
    from lm_eval.models.huggingface import HFLM

    run, export = run_and_export(tmp_path, kind)
    write_tasks(tmp_path)
    names = ["local_choice", "local_rolling", "local_generate"]
    settings = FewShot(names, task_folder=str(tmp_path), prepend_start=False, save_samples=True)
    theirs: Any = HFLM(
        pretrained=str(export), dtype="float32", batch_size=4, device="cpu", max_length=64
    )
    their_results, their_samples = harness.evaluate(theirs, harness_tasks.load(settings), settings)

    saved, mesh = find_model(run, None, "model"), MeshConfig().make(jax.devices())
    examine = settings.prepare(Examinee(saved, mesh, batch_size=8))
    summary = examine(tmp_path)["few_shot"]
    assert summary["local_choice"] == their_results["local_choice"]  # the same choices
    for name in names:
        lines = (tmp_path / f"samples_{name}.jsonl").read_text().splitlines()
        our_samples = [json.loads(line) for line in lines]
        assert len(our_samples) == 12
        for their, our in zip(their_samples[name], our_samples, strict=True):
            if name == "local_generate":
                assert our["resps"] == their["resps"]
                assert our["resps"][0][0]
                continue
            for one, other in zip(their["filtered_resps"], our["filtered_resps"], strict=True):
                pairs = (one, other) if name == "local_choice" else ((one, True), (other, True))
                (their_total, their_greedy), (our_total, our_greedy) = pairs
                assert our_total == pytest.approx(their_total, abs=1e-3)
                assert our_greedy == their_greedy
        for metric, their in their_results[name]["metrics"].items():
            value = summary[name]["metrics"][metric]["value"]
            assert value == pytest.approx(their["value"], abs=1e-4)
