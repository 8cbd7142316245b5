"""The same GPT-NeoX through lm-eval's own hf backend and through ours."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from salt_jax.data.vocabularies import HuggingFaceVocabulary
from salt_jax.evaluation.harness import HarnessModel
from salt_jax.evaluation.harness_tasks import Tasks
from salt_jax.models import decoder

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which lm-eval's backend needs, isn't there")

CONFIG = decoder.DecoderConfig(
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    mlp_dim=64,
    vocab_size=400,
    max_length=64,
    norm="layernorm",
    norm_epsilon=1e-5,
    use_bias=True,
    parallel_residual=True,
    gated_mlp=False,
    mlp_activation="gelu",
    rope_fraction=0.25,
    tied_embeddings=False,
    scale_embeddings=False,
    scan_layers=False,
)
TEXT = " ".join(f"Number {n} comes after {n - 1}, and salt comes from the sea." for n in range(99))


def tensors(params: Any) -> dict[str, Any]:
    """The parameters under GPT-NeoX's names."""
    state = {
        "gpt_neox.embed_in.weight": params["embedding"],
        "gpt_neox.final_layer_norm.weight": params["final_norm"]["scale"],
        "gpt_neox.final_layer_norm.bias": params["final_norm"]["bias"],
    }
    size = CONFIG.embed_dim
    for layer in range(CONFIG.num_layers):
        block, to = params[f"layers_{layer}"], f"gpt_neox.layers.{layer}."
        heads = [block["attention"][name] for name in ("query", "key", "value")]
        # One matrix: of each head its query, then its key, then its value.
        kernel_HxKxD = np.stack([np.moveaxis(h["kernel"], 0, 2) for h in heads], 1)
        state[f"{to}attention.query_key_value.weight"] = kernel_HxKxD.reshape(3 * size, size)
        state[f"{to}attention.query_key_value.bias"] = np.stack(
            [h["bias"] for h in heads], 1
        ).reshape(3 * size)
        out = block["attention"]["out"]
        state[f"{to}attention.dense.weight"] = np.reshape(out["kernel"], (size, size)).T
        state[f"{to}attention.dense.bias"] = out["bias"]
        for ours, theirs in (("attention", "input"), ("mlp", "post_attention")):
            state[f"{to}{theirs}_layernorm.weight"] = block[f"{ours}_norm"]["scale"]
            state[f"{to}{theirs}_layernorm.bias"] = block[f"{ours}_norm"]["bias"]
        for ours, theirs in (("up", "dense_h_to_4h"), ("down", "dense_4h_to_h")):
            state[f"{to}mlp.{theirs}.weight"] = block["mlp"][ours]["kernel"].T
            state[f"{to}mlp.{theirs}.bias"] = block["mlp"][ours]["bias"]
    return {name: torch.tensor(np.array(value, np.float32)) for name, value in state.items()}


def neox(params: Any) -> Any:
    shape = transformers.GPTNeoXConfig(
        vocab_size=CONFIG.padded_vocab_size,
        hidden_size=CONFIG.embed_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        intermediate_size=CONFIG.mlp_dim,
        max_position_embeddings=CONFIG.max_length,
        rotary_pct=CONFIG.rope_fraction,
        rotary_emb_base=CONFIG.rope_theta,
        layer_norm_eps=CONFIG.norm_epsilon,
        hidden_act="gelu",
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPTNeoXForCausalLM(shape).float().eval()
    missing, unexpected = model.load_state_dict(tensors(params), strict=False)
    assert not unexpected
    assert len(missing) == 1  # the head, whose name depends on the version
    model.get_output_embeddings().weight.data = torch.tensor(np.array(params["head"]))
    return model


def random_params() -> Any:
    """Every one of them random, biases too; ids that only pad the vocabulary are never likely."""
    fresh = nn.unbox(decoder.init_params(CONFIG, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        2 * leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.map(np.array, jax.tree.unflatten(tree, noisy))
    return params


def tokenizer_file(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_tasks(folder: pathlib.Path) -> None:
    rows = [
        {"text": TEXT[at : at + 30 * n + 5], "choices": [" the sea", " Number 7", " a mine"]}
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


def test_lm_eval_s_own_backend_says_the_same(
    harness: Callable[..., HarnessModel], tmp_path: pathlib.Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    params, path = random_params(), tokenizer_file(tmp_path)
    write_tasks(tmp_path)
    theirs = HFLM(
        pretrained=neox(params),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        ),
        batch_size=4,
        device="cpu",
        max_length=CONFIG.max_length,
    )
    # Their backend knows no padding of the vocabulary: it counts those ids.
    config = decoder.dataclasses.replace(CONFIG, vocab_size=CONFIG.padded_vocab_size)
    ours = harness(
        config=config, params=params, vocabulary=HuggingFaceVocabulary(path), prepend_start=False
    )
    tasks = Tasks(str(tmp_path))
    names = ["local_choice", "local_rolling", "local_generate"]
    found = [tasks.evaluate(model, tasks.load(names)) for model in (theirs, ours)]
    (their_results, their_samples), (our_results, our_samples) = found
    assert our_results["local_choice"] == their_results["local_choice"]
    for name in names:
        for their, our in zip(their_samples[name], our_samples[name], strict=True):
            if name == "local_generate":
                assert our["resps"] == their["resps"]
                continue
            answers = zip(their["filtered_resps"], our["filtered_resps"], strict=True)
            for one, other in answers:
                pair = (one, other) if name == "local_choice" else ((one, 0), (other, 0))
                assert pair[1][0] == pytest.approx(pair[0][0], abs=1e-3)
                assert pair[1][1] == pair[0][1]
