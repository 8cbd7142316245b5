"""What a run reads and trains on: batch sizes that change, mixtures, unused rows, objectives."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from salt_jax.commands.select import select
from salt_jax.data.denoisers import Objectives, SpanDenoiser
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import MixedOrder, RowOrder
from salt_jax.data.row_scores import Selection
from salt_jax.distill import divergences, losses, schedules
from salt_jax.distill.selection import RandomRows
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.models import attention
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import loop
from salt_jax.training.checkpoints import CheckpointConfig, find_model
from salt_jax.training.evaluation import Evaluator
from salt_jax.training.learning_rates import WarmupConstant, WarmupCosine
from salt_jax.training.optimizers import AdamW
from salt_jax.training.partitioning import MeshConfig

STUDENT = DecoderConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=64)
Run = Callable[..., pathlib.Path]
SALT = schedules.Step(omega=0.6, n_kd=3)
# For rows of 16 tokens.
UL2 = Objectives(denoisers=[SpanDenoiser("R", 2, 0.2), SpanDenoiser("X", 2, 0.5)])


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """Every batch handed to a step, in order."""
    record: list[dict[str, np.ndarray]] = []
    original = loop.Loop._step

    def step(self: Any, number: int, state: Any, batch: Any, programs: Any) -> Any:
        record.append(batch)
        return original(self, number, state, batch, programs)

    monkeypatch.setattr(loop.Loop, "_step", step)
    return record


def ids(fed: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(row_id) for batch in fed for row_id in batch["row_id"]]


def history(run: pathlib.Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def stop_after(run: pathlib.Path, step: int) -> None:
    """As if the run had been killed before its next checkpoint."""
    for later in (run / "checkpoints").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)


def test_a_run_goes_on_with_another_batch_size(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    fed: list[dict[str, np.ndarray]],
) -> None:
    """Of 48 rows none twice and none left out; tokens and FLOPs are those that were spent."""
    select(RunFolder(tmp_path / "s", "select"), cache=str(cache.path), rule=RandomRows(m=40))
    chosen = Selection.open(tmp_path / "s").row_ids
    run = tmp_path / "run"
    settings = {"schedule": SALT, "teacher": str(slm), "selection": str(tmp_path / "s")}
    run_train(run, batch_size=8, **settings)
    stop_after(run, 2)
    fed.clear()
    run_train(run, batch_size=16, microbatches=2, stage1_microbatches=1, **settings)
    stop_after(run, 4)
    run_train(run, batch_size=8, mesh=MeshConfig(data=2), **settings)
    selected, all_rows = RowOrder(chosen, 0, 0), RowOrder(None, 48, 0)
    expected = [selected[i] for i in range(16, 32)]
    expected += [all_rows[i] for i in range(32, 80)]  # steps 3 to 5 of 16
    expected += [all_rows[i] for i in range(48, 64)]  # steps 4 and 5 again, of 8
    assert ids(fed) == [draw.row_id for draw in expected]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rows_consumed"] == {"stage1": 32, "stage2": 32}
    assert summary["epochs"] == {run_cache(run): 32 / 48, "selected rows": 32 / 40}
    assert (summary["stage1_tokens"], summary["stage2_tokens"]) == (32 * 16, 32 * 16)
    per_token = history(run)[0]["student_flops"] / (8 * 16)
    assert summary["student_flops"] == pytest.approx(64 * 16 * per_token)
    # Learning rates go by steps, whatever their batches.
    rates = WarmupCosine(5e-3, warmup_steps=2).schedule(6)
    for line in history(run):
        assert line["learning_rate"] == pytest.approx(float(rates(line["step"] - 1)))


def test_what_may_change_by_the_command(
    cache: PackedCache, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"embed_dim": 16, "num_layers": 1, "num_heads": 1, "mlp_dim": 16}
    command = [
        *("train", "--gin_file=runs/pretrain.gin", "--gin_file=methods/baseline.gin"),
        *(f"--gin.decoder.DecoderConfig.{name}={value}" for name, value in tiny.items()),
        *(f"--cache={cache.path}", "--steps=2", "--gin.LEARNING_RATE=1e-3"),
        *("--compilation_cache=", f"--output_dir={tmp_path / 'run'}"),
    ]
    assert main([*command, "--batch_size=8"]) == 0
    stop_after(tmp_path / "run", 0)
    changes = ["--batch_size=16", "--gin.SAVE_EVERY=1", "--log_every=1", "--read_threads=1"]
    capsys.readouterr()
    assert main([*command, *changes]) == 0
    said = capsys.readouterr().out
    assert "[baseline] config.Data.batch_size was 8 and is now 16" in said
    assert "[baseline] SAVE_EVERY was 1000 and is now 1" in said
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows_consumed"]
    assert rows == {"stage1": 0, "stage2": 32}
    assert main([*command, *changes, "--data.seed=1"]) == 2
    assert "configuration: config.Data.seed was 0 and is now 1" in capsys.readouterr().err


def test_stage_2_can_leave_out_what_stage_1_read(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    fed: list[dict[str, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for m in (16, 40, 48):
        folder = RunFolder(tmp_path / str(m), "select")
        select(folder, cache=str(cache.path), rule=RandomRows(m=m))
    for m in (16, 40):
        fed.clear()
        settings = {"selection": str(tmp_path / str(m)), "stage2_rows": "unused"}
        run = run_train(schedule=SALT, teacher=str(slm), **settings)
        stage1, stage2 = ids(fed[:3]), ids(fed[3:])
        assert len(set(stage1)) == min(m, 24)
        assert not set(stage1) & set(stage2)
        assert len(set(stage2)) == 24
        left = 48 - min(m, 24)
        assert history(run)[-1]["epochs"] == {run_cache(run): 24 / left, "selected rows": 24 / m}
    assert "0.75 epochs of 32 rows" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"stage 1 reads all 48 rows of .*select fewer"):
        run_train(
            schedule=schedules.Step(0.5, 6),
            teacher=str(slm),
            selection=str(tmp_path / "48"),
            stage2_rows="unused",
        )


def run_cache(run: pathlib.Path) -> str:
    return json.loads((run / "summary.json").read_text())["caches"][0]["name"]


def test_a_mixture_of_caches(
    run_train: Run,
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    slm: pathlib.Path,
    tmp_path: pathlib.Path,
    fed: list[dict[str, np.ndarray]],
) -> None:
    other = make_cache(rows=16, seed=3)
    names = [cache.path.name, other.path.name]
    mixture = {"cache": [str(cache.path), str(other.path)], "cache_weights": (3, 1)}
    run = run_train(**mixture)
    orders = [RowOrder(None, 48, 0, 0), RowOrder(None, 16, 0, 1)]
    mixed = MixedOrder(orders, [3, 1])
    assert ids(fed) == [mixed[i].row_id for i in range(48)]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epochs"] == dict.fromkeys(names, 0.75) == history(run)[-1]["epochs"]
    assert [c["digest"] for c in summary["caches"]] == [cache.digest, other.digest]
    assert [c["share"] for c in summary["caches"]] == [0.75, 0.25]
    # Both validation splits count, each subset under its cache's name.
    model, mesh = find_model(run, None, "model"), MeshConfig().make()
    alone = [
        Evaluator(model.config, c, "validation", 8, mesh)(model.load_params(mesh))
        for c in (cache, other)
    ]
    tokens = [e.whole.tokens for e in alone]
    whole = np.average([e.whole.log_perplexity for e in alone], weights=tokens)
    assert summary["log_perplexity"] == pytest.approx(whole, rel=1e-5)
    assert summary["evaluated_tokens"] == sum(tokens)
    assert summary["by_subset"].keys() == {f"{n}/{s}" for n in names for s in ("code", "prose")}
    assert summary["evaluation_tokens"] == 2 * 20 * 16
    # A selection is of one of them, and stage 1 reads that alone.
    select(RunFolder(tmp_path / "s", "select"), cache=str(other.path), rule=RandomRows(m=9))
    fed.clear()
    settings = {"schedule": SALT, "teacher": str(slm), "selection": str(tmp_path / "s")}
    salt_ds = run_train(**mixture, **settings)
    chosen = Selection.open(tmp_path / "s").row_ids
    assert set(ids(fed[:3])) == set(chosen)
    row = other.split("train")[ids(fed)[0]]
    np.testing.assert_array_equal(fed[0]["targets"][0], row["targets"])
    assert ids(fed[3:]) == [mixed[i].row_id for i in range(24, 48)]
    assert history(salt_ds)[-1]["epochs"] == {
        names[0]: 18 / 48,
        names[1]: 6 / 16,
        "selected rows": 24 / 9,
    }
    stop_after(run, 2)
    for settings in ({"cache_weights": (1, 1)}, {"cache": mixture["cache"][::-1]}):
        with pytest.raises(InputError, match="was made with the cache_digest"):
            run_train(run, **{**mixture, **settings})


def test_caches_that_do_not_mix_are_refused(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
) -> None:
    select(
        RunFolder(tmp_path / "s", "select"),
        cache=str(make_cache(seed=8).path),
        rule=RandomRows(m=9),
    )
    more = {
        "has the vocabulary": make_cache(reserved=2),
        "rows of 8 tokens": make_cache(length=8),
        "whose last parts differ": cache,
    }
    for expected, other in more.items():
        with pytest.raises(InputError, match=expected):
            run_train(tmp_path / "out", cache=[str(cache.path), str(other.path)])
    other = make_cache(seed=2)
    both: dict[str, Any] = {"cache": [str(cache.path), str(other.path)]}
    with pytest.raises(InputError, match="there are 2 caches"):
        run_train(tmp_path / "out", **both, cache_weights=(1.0,))
    with pytest.raises(InputError, match="there is one cache"):
        run_train(tmp_path / "out", cache_weights=(1.0,))
    with pytest.raises(InputError, match=rf"{cache.path} .* {other.path} .*select again"):
        run_train(
            tmp_path / "out",
            **both,
            schedule=SALT,
            teacher=str(slm),
            selection=str(tmp_path / "s"),
        )
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def reserved(make_cache: Callable[..., PackedCache]) -> PackedCache:
    """A cache whose vocabulary has modes and sentinels."""
    return make_cache(reserved=12)


def test_ul2_with_a_causal_teacher(
    run_train: Run, reserved: PackedCache, fed: list[dict[str, np.ndarray]]
) -> None:
    cached = {"cache": str(reserved.path)}
    teacher = run_train(**cached, steps=2, checkpoints=CheckpointConfig(save_every=0))
    fed.clear()
    settings = {"schedule": SALT, "teacher": str(teacher), "objectives": UL2, **cached}
    loss = losses.LossConfig(teacher_temperature=1.0)
    run = run_train(**settings, loss=loss, teacher_objectives="causal")
    changed = list(fed)
    shares = []
    for line, batch in zip(history(run)[:3], changed, strict=False):
        taught = np.sum(batch["distill"][:, None] * batch["loss_weights"])
        shares.append(taught / batch["loss_weights"].sum())
        assert line["distilled"] == pytest.approx(shares[-1])
        assert 4 < line["soft_loss"] < 7
    assert 0 < min(shares) < 1
    assert "distilled" not in history(run)[-1]
    fed.clear()
    everywhere = run_train(**settings, loss=loss)
    for batch, same in zip(changed, fed, strict=True):
        np.testing.assert_array_equal(batch["targets"], same["targets"])
        assert "distill" not in same
    assert "distilled" not in history(everywhere)[0]
    assert history(everywhere)[0]["loss"] != history(run)[0]["loss"]
    # Evaluation stays causal: every token but the first of a row counts.
    assert history(run, "eval")[-1]["evaluated_tokens"] == 10 * 15
    # A run goes on as it began: the same rows, made into the same.
    for others in (
        {},
        {"objectives": None},
        {"objectives": dataclasses.replace(UL2, span=0.1), "teacher_objectives": "causal"},
    ):
        with pytest.raises(InputError, match=r"was made with the objectives .* and this run has"):
            run_train(run, **{**settings, **others}, loss=loss)


def test_ul2_with_a_teacher_without_reserved_ids(
    run_train: Run,
    cache: PackedCache,
    reserved: PackedCache,
    fed: list[dict[str, np.ndarray]],
    tmp_path: pathlib.Path,
) -> None:
    """As a Pythia has none."""
    teacher = run_train(cache=str(cache.path), steps=2, checkpoints=CheckpointConfig(save_every=0))
    settings = {"schedule": SALT, "teacher": str(teacher), "cache": str(reserved.path)}
    loss = losses.LossConfig(teacher_temperature=1.0)
    fed.clear()
    run = run_train(**settings, objectives=UL2, loss=loss, teacher_objectives="causal")
    assert any(np.any(batch["inputs"] >= cache.vocabulary_size) for batch in fed[:3])
    assert 0 < min(line["distilled"] for line in history(run)[:3]) < 1
    for line in history(run)[:3]:
        assert 4 < line["soft_loss"] < 7
        assert 4 < line["teacher_hard"] < 7
    # Rows as they are have no reserved ids: it teaches them all, scores them, evaluates on them.
    plain = run_train(**settings, loss=loss)
    assert "distilled" not in history(plain)[0]
    assert find_model(teacher, None, "scorer", reserved).config.vocab_size == cache.vocabulary_size
    refused = {**settings, "folder": tmp_path / "out"}
    with pytest.raises(InputError, match=r"lacks the last 12 of .* --teacher.objectives=causal"):
        run_train(**refused, objectives=UL2, loss=loss)
    with pytest.raises(InputError, match=r"ReverseKL\(\), which is infinite for the 12 ids"):
        run_train(**refused, loss=losses.LossConfig(divergence=divergences.ReverseKL()))
    with pytest.raises(InputError, match="teacher_top_k is 260, more than the vocabulary's 259"):
        run_train(**refused, loss=losses.LossConfig(teacher_top_k=260))
    assert not (tmp_path / "out").exists()


def test_the_teacher_sees_what_the_student_sees(
    run_train: Run, reserved: PackedCache, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that is the student agrees with it, also with prefixes seen in both directions."""
    both = Objectives(0, 1, 1, UL2.denoisers, bidirectional_prefix=True)
    cached = {"cache": str(reserved.path), "objectives": both}
    seen: list[bool] = []
    original = attention.reference_attention

    def noted(*arrays: Any, **options: Any) -> jax.Array:
        seen.append(len(arrays) == 5)
        return original(*arrays, **options)

    monkeypatch.setattr(attention, "reference_attention", noted)
    teacher = run_train(**cached, steps=2, evaluate_every=2)
    assert any(seen)
    still = AdamW(WarmupConstant(1e-9), weight_decay=0)
    run = run_train(
        schedule=schedules.Constant(0.5),
        teacher=str(teacher),
        initial=str(teacher),
        optimizer=still,
        steps=2,
        **cached,
    )
    for line in history(run):
        assert line["agreement"] == 1.0
        assert line["teacher_hard"] == pytest.approx(line["log_perplexity"], rel=1e-4)
    student = dataclasses.replace(STUDENT, attention_backend="splash")
    with pytest.raises(InputError, match=r"attention_backend is 'splash'.* bidirectional_prefix"):
        run_train(
            tmp_path / "out",
            model=student,
            **cached,
        )


def test_objectives_need_reserved_ids(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError, match=r"need \d+ reserved ids .* has 0: prepare the cache"):
        run_train(tmp_path / "out", objectives=UL2)
    taught: dict[str, Any] = {"schedule": SALT, "teacher": str(slm)}
    with pytest.raises(InputError, match=r"objectives are 'some': set --teacher\.objectives to"):
        run_train(tmp_path / "out", **taught, teacher_objectives="some")
    with pytest.raises(InputError, match="stage2_rows is 'few'"):
        run_train(tmp_path / "out", stage2_rows="few")
    assert not (tmp_path / "out").exists()
