"""Evaluation, scoring and the bigram model against plain NumPy."""

import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from salt_jax.commands.evaluate import evaluate
from salt_jax.commands.score import score
from salt_jax.commands.select import select
from salt_jax.data.features import make_batch
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.distill.selection import TopRows
from salt_jax.errors import InputError
from salt_jax.evaluation.held_out import HeldOut
from salt_jax.models import decoder
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import checkpoints
from salt_jax.training.bigram import bigram_log_perplexity
from salt_jax.training.checkpoints import find_model
from salt_jax.training.config import Devices
from salt_jax.training.evaluation import Evaluator, Quality
from salt_jax.training.ledger import Cost
from salt_jax.training.partitioning import MeshConfig


def log_p(slm: pathlib.Path, cache: PackedCache, split: str, step: int | None) -> Any:
    """Batch and float64 log-probabilities [B, L, V] of a whole split."""
    model = find_model(slm, step, "model")
    params = model.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1]))
    rows = cache.split(split)
    batch = make_batch(rows.__getitems__(list(range(len(rows)))), cache.start_id)
    hidden_BxLxD = decoder.Decoder(model.config).apply(
        {"params": params}, batch["inputs"], batch["segment_ids"], batch["positions"]
    )
    head_VxD = decoder.head_kernel(params, model.config)
    logits = np.asarray(hidden_BxLxD, np.float64) @ np.asarray(head_VxD, np.float64).T
    logits = logits[..., : cache.vocabulary_size]
    logits -= logits.max(-1, keepdims=True)
    return batch, logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_evaluation_equals_numpy(
    slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    evaluate(
        RunFolder(tmp_path, "evaluate"),
        model=str(slm),
        held_out=HeldOut(str(cache.path), "validation"),
        batch_size=8,
        devices=Devices(compilation_cache=""),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    batch, log_p_BxLxV = log_p(slm, cache, "validation", None)
    loss_BxL = -np.take_along_axis(log_p_BxLxV, batch["targets"][..., None], -1)[..., 0]
    weights_BxL = batch["loss_weights"]
    right_BxL = log_p_BxLxV.argmax(-1) == batch["targets"]
    expected = (loss_BxL * weights_BxL).sum() / weights_BxL.sum()
    assert summary["log_perplexity"] == pytest.approx(expected, rel=1e-5)
    accuracy = (right_BxL * weights_BxL).sum() / weights_BxL.sum()
    assert summary["next_token_accuracy"] == pytest.approx(accuracy)
    assert summary["evaluated_bytes"] == _bytes(cache, batch["targets"], weights_BxL)
    for index, name in enumerate(cache.subsets):
        mine_B = batch["subset"] == index
        nats = (loss_BxL * weights_BxL)[mine_B].sum()
        subset = summary["by_subset"][name]
        expected = nats / weights_BxL[mine_B].sum()
        assert subset["log_perplexity"] == pytest.approx(expected, rel=1e-5)
        size = _bytes(cache, batch["targets"][mine_B], weights_BxL[mine_B])
        assert subset["bytes"] == size
        assert subset["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    cost = Cost.of(find_model(slm, None, "model").config, 10, cache.sequence_length)
    assert (summary["flops"], summary["tokens"]) == (cost.flops, cost.tokens)
    assert summary["seconds"] > 0


def test_a_comparison_with_an_earlier_checkpoint_equals_numpy(
    slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    early = min(checkpoints.complete_steps(slm))
    evaluate(
        RunFolder(tmp_path, "evaluate"),
        model=str(slm),
        held_out=HeldOut(
            str(cache.path),
            "validation",
            compare=str(slm),
            compare_step=early,
            slm=str(slm),
            slm_step=early,
        ),
        batch_size=8,
        devices=Devices(compilation_cache=""),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["comparison"]
    losses = []
    for step in (None, early):
        batch, log_p_BxLxV = log_p(slm, cache, "validation", step)
        losses.append(-np.take_along_axis(log_p_BxLxV, batch["targets"][..., None], -1)[..., 0])
    d_BxL, counts_BxL = losses[0] - losses[1], batch["loss_weights"] > 0
    whole = found["all"]["all"]
    assert whole["mean"] == pytest.approx(d_BxL[counts_BxL].mean(), rel=1e-4)
    assert whole["low"] < whole["mean"] < whole["high"] < 0
    segments = batch["row_id"][:, None] * 1000 + batch["segment_ids"]
    assert whole["pieces"] == len(np.unique(segments[counts_BxL]))
    for index, name in enumerate(cache.subsets):
        mask_BxL = counts_BxL & (batch["subset"] == index)[:, None]
        assert found["by_subset"][name]["mean"] == pytest.approx(d_BxL[mask_BxL].mean(), rel=1e-4)
    eighth_L = np.arange(cache.sequence_length) * 8 // cache.sequence_length
    last_BxL = counts_BxL & (eighth_L == 7)
    assert found["by_position"]["8 of 8"]["mean"] == pytest.approx(d_BxL[last_BxL].mean(), rel=1e-4)
    easy, hard = (
        losses[1][counts_BxL][np.argsort(losses[1][counts_BxL])[part]].mean()
        for part in (slice(20), slice(-20, None))
    )
    assert easy < hard
    assert len(found["by_decile"]) == 10
    tokens = [each["tokens"] for each in found["by_decile"].values()]
    assert sum(tokens) == whole["tokens"]
    assert max(tokens) - min(tokens) <= 6  # equal losses share a decile


def _bytes(cache: PackedCache, targets_BxL: np.ndarray, weights_BxL: np.ndarray) -> int:
    """Of the text of what counts: bytes of one id each, broken characters too."""
    vocabulary = cache.vocabulary
    return sum(len(vocabulary.decode([i]).encode("utf-8")) for i in targets_BxL[weights_BxL > 0])


def test_several_caches_are_evaluated_as_one(
    slm: pathlib.Path, cache: PackedCache, make_cache: Callable[..., PackedCache]
) -> None:
    model, mesh = find_model(slm, None, "model"), MeshConfig().make()
    params, caches = model.load_params(mesh), {"a": cache, "b": make_cache(seed=1)}
    settings = ("validation", 8, mesh)
    each = [Evaluator(model.config, one, *settings)(params) for one in caches.values()]
    evaluator = Evaluator(model.config, caches, *settings)
    both = evaluator(params)
    assert evaluator.rows == 20
    assert both.by_subset == {
        f"{name}/{subset}": quality
        for name, one in zip(caches, each, strict=True)
        for subset, quality in one.by_subset.items()
    }
    tokens, size = (sum(getattr(one.whole, n) for one in each) for n in ("tokens", "bytes"))
    nats = sum(one.whole.log_perplexity * one.whole.tokens for one in each)
    assert (both.whole.tokens, both.whole.bytes) == (tokens, size)
    assert both.whole.log_perplexity == pytest.approx(nats / tokens)
    assert both.whole.bits_per_byte == pytest.approx(nats / math.log(2) / size)
    assert math.isnan(Quality.of(np.array([1.0, 0, 1, 0])).bits_per_byte)  # an end of document


def test_scores_equal_numpy_and_are_selected_from(
    slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    score(
        RunFolder(tmp_path / "scores", "score"),
        scorer=str(slm),
        scorer_step=4,
        cache=str(cache.path),
        k=(5, 3),
        shard_rows=20,
        batch_size=9,
        devices=Devices(compilation_cache=""),
    )
    scores = RowScores.open(tmp_path / "scores", cache_digest=cache.digest)
    batch, log_p_BxLxV = log_p(slm, cache, "train", 4)
    columns = {name: scores.column(name)[:] for name in dict(scores.manifest["columns"])}
    for row in range(len(cache.split("train"))):
        losses, dropped = [], []
        for t in range(1, cache.sequence_length):
            if batch["loss_weights"][row, t] == 0:
                continue
            true = log_p_BxLxV[row, t, batch["targets"][row, t]]
            losses.append(-true)
            if (log_p_BxLxV[row, t] > true).sum() < 3:
                dropped.append(-true)
        zeros = [0.0] * (len(losses) - len(dropped))
        expected = {
            "median_drop_k3": np.median(dropped) if dropped else -np.inf,
            "median_zero_k3": np.median(dropped + zeros) if dropped else -np.inf,
            "mean_k3": np.mean(dropped) if dropped else -np.inf,
            "learnable_k3": len(dropped) / len(losses),
            "log_perplexity": np.mean(losses),
            "subset": batch["subset"][row],
        }
        for name, value in expected.items():
            assert columns[name][row] == pytest.approx(value, rel=1e-4), name
    assert len({*columns["targets_hash"].tolist()}) == len({*map(bytes, batch["targets"])})
    assert (columns["learnable_k5"] >= columns["learnable_k3"]).all()
    assert scores.manifest["scorer"] == find_model(slm, 4, "scorer").identity
    assert scores.manifest["k"] == [3, 5]
    cost = Cost.of(find_model(slm, None, "model").config, 48, cache.sequence_length)
    assert scores.cost
    assert (scores.cost["flops"], scores.cost["tokens"]) == (cost.flops, cost.tokens)
    assert scores.cost["seconds"] > 0
    select(
        RunFolder(tmp_path / "top", "select"),
        cache=str(cache.path),
        rule=TopRows(m=7),
        scores=str(tmp_path / "scores"),
        k=3,
    )
    chosen = Selection.open(tmp_path / "top", cache_digest=cache.digest)
    order = np.lexsort((np.arange(48), -columns["median_drop_k3"]))
    assert chosen.row_ids.tolist() == sorted(order[:7].tolist())
    assert chosen.manifest["scores_digest"] == scores.digest
    summary = json.loads((tmp_path / "top" / "summary.json").read_text())
    assert sum(summary["by_subset"].values()) == 7


def test_scores_of_another_cache_are_refused(
    slm: pathlib.Path,
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
) -> None:
    other = make_cache(seed=5)
    score(
        RunFolder(tmp_path / "scores", "score"),
        scorer=str(slm),
        cache=str(other.path),
        devices=Devices(compilation_cache=""),
    )
    with pytest.raises(InputError, match="belong to the cache"):
        select(
            RunFolder(tmp_path / "top", "select"),
            cache=str(cache.path),
            rule=TopRows(m=7),
            scores=str(tmp_path / "scores"),
        )


def test_bigram_equals_counting(cache: PackedCache) -> None:
    """Witten-Bell by dictionaries."""
    size = cache.vocabulary_size

    def pairs(split: str) -> list[tuple[int, int]]:
        rows = cache.split(split)
        batch = make_batch(rows.__getitems__(list(range(len(rows)))), cache.start_id)
        mask = batch["loss_weights"] > 0
        return list(
            zip(batch["inputs"][mask].tolist(), batch["targets"][mask].tolist(), strict=True)
        )

    train = pairs("train")
    both, after = Counter(train), Counter(a for a, _ in train)
    single = Counter(b for _, b in train)
    followers = Counter(a for a, _ in both)

    def p(a: int, b: int) -> float:
        unigram = (single[b] + len(single) / size) / (len(train) + len(single))
        if not after[a]:
            return unigram
        return (both[a, b] + followers[a] * unigram) / (after[a] + followers[a])

    held_out = pairs("test")
    expected = -sum(math.log(p(a, b)) for a, b in held_out) / len(held_out)
    actual = bigram_log_perplexity(cache.split("train"), cache.split("test"), size, cache.start_id)
    assert actual == pytest.approx(expected)
    assert sum(p(5, b) for b in range(size)) == pytest.approx(1.0)
    assert sum(p(train[0][0], b) for b in range(size)) == pytest.approx(1.0)
