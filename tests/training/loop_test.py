"""Whole runs: resumed equals straight, the switch changes nothing but the teacher, rows as
promised."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from salt_jax.commands.score import score
from salt_jax.commands.select import select
from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import RowOrder
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.distill import gates, losses, schedules
from salt_jax.distill.alignment import Alignment
from salt_jax.distill.selection import RandomRows, TopRows
from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import flops, loop
from salt_jax.training.checkpoints import CheckpointConfig, find_model
from salt_jax.training.config import Devices
from salt_jax.training.learning_rates import WarmupConstant, WarmupStableDecay
from salt_jax.training.ledger import Cost, Counters
from salt_jax.training.optimizers import AdamW, Muon
from salt_jax.training.partitioning import MeshConfig
from tests.training.doubles import Killed, kill_at

Run = Callable[..., pathlib.Path]
SALT = schedules.Step(omega=0.6, n_kd=3)
ADAMW = AdamW(WarmupConstant(5e-3, warmup_steps=2), weight_decay=0.1)
MUON = Muon(WarmupStableDecay(5e-3, 2, decay_fraction=0.4), weight_decay=0.1)
NONE = schedules.NoDistillation()
LET = Alignment(stop=4, layer=1)  # of a wider student: it has a projection
# It decides after 2 steps, with any signal.
ADAPTIVE = schedules.Adaptive(omega=0.6, most=5, margin=1e9, window=4, patience=2)
GATED = losses.LossConfig(teacher_temperature=1.0, gate=gates.TeacherAhead())
# All of a run's costs that are the same on every machine, and however often it was killed.
COUNTED = [name for name in Counters().to_json() if "seconds" not in name]


def params_of(run: pathlib.Path, step: int | None = None) -> list[np.ndarray]:
    model = find_model(run, step, "model")
    return [np.asarray(p) for p in jax.tree.leaves(model.load_params(MeshConfig().make()))]


def assert_same(a: pathlib.Path, b: pathlib.Path, step: int | None = None) -> None:
    for x, y in zip(params_of(a, step), params_of(b, step), strict=True):
        np.testing.assert_array_equal(x, y)


def metrics_of(run: pathlib.Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Row ids of every batch handed to a step, in order."""
    record: list[list[int]] = []
    original = loop.Loop._step

    def step(self: Any, number: int, state: Any, batch: Any, programs: Any) -> Any:
        record.append(batch["row_id"].tolist())
        return original(self, number, state, batch, programs)

    monkeypatch.setattr(loop.Loop, "_step", step)
    return record


@pytest.mark.parametrize(
    ("killed_step", "more"),
    [
        (3, {}),
        (5, {}),
        (5, {"optimizer": MUON}),
        (3, {"loss": GATED}),
        (3, {"schedule": NONE, "alignment": LET}),
        (5, {"alignment": LET, "optimizer": MUON}),
        (3, {"schedule": ADAPTIVE}),
        (5, {"schedule": ADAPTIVE}),
    ],
    ids=["3", "5", "muon", "gate", "let", "salt and let", "adaptive 3", "adaptive 5"],
)
def test_resumed_equals_straight(
    run_train: Run,
    slm: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_step: int,
    more: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"schedule": SALT, "teacher": str(slm), "optimizer": ADAMW, **more}
    straight = run_train(**settings)
    with monkeypatch.context() as patch:
        kill_at(patch, killed_step)
        with pytest.raises(Killed):
            run_train(tmp_path, **settings)
    run_train(tmp_path, **settings)
    assert_same(straight, tmp_path)
    assert f"continues at step {killed_step - 1}" in capsys.readouterr().out
    assert [m["step"] for m in metrics_of(tmp_path)][-1] == 6
    last = json.loads((tmp_path / "summary.json").read_text())
    expected = json.loads((straight / "summary.json").read_text())
    for name in ("log_perplexity", "next_token_accuracy", "by_subset", *COUNTED):
        assert last[name] == expected[name], name
    for name in ("distill_steps", "watched"):
        assert last.get(name) == expected.get(name), name


def test_stage_2_equals_a_teacherless_run_from_the_same_checkpoint(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    salt = run_train(
        schedule=SALT, teacher=str(slm), checkpoints=CheckpointConfig(save_every=3, keep_last=9)
    )
    copy = tmp_path / "checkpoints"
    copy.mkdir()
    (salt / "checkpoints" / "3").rename(copy / "3")
    run_train(tmp_path, checkpoints=CheckpointConfig(save_every=3, keep_last=9))
    assert_same(salt, tmp_path)
    assert [m["stage"] for m in metrics_of(salt)] == [1, 1, 1, 2, 2, 2]
    assert [m["omega"] for m in metrics_of(salt)] == [0.6] * 3 + [0.0] * 3


def test_the_schedule_weighs_every_step(run_train: Run, slm: pathlib.Path) -> None:
    schedule = schedules.LinearDecay(omega=0.9, start=1, n_kd=5)
    run = run_train(
        schedule=schedule, teacher=str(slm), loss=losses.LossConfig(teacher_temperature=0.5)
    )
    history = metrics_of(run)
    omegas = [schedule.omega_at(step) for step in range(6)]
    assert omegas[-1] == 0
    assert len(set(omegas)) == 5
    for omega, line in zip(omegas, history, strict=True):
        soft = line.get("soft_loss", 0.0)
        expected = (1 - omega) * line["log_perplexity"] + omega * soft
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert ["soft_loss" in line for line in history] == [True] * 5 + [False]


@pytest.mark.parametrize("signal", schedules.SIGNALS)
def test_adaptive_is_salt_with_the_n_kd_that_it_decides_on(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path, signal: str
) -> None:
    settings: dict[str, Any] = {"teacher": str(slm), "optimizer": ADAMW}
    salt = run_train(schedule=SALT, **settings)
    schedule = dataclasses.replace(ADAPTIVE, signal=signal)
    run = run_train(schedule=schedule, **settings)
    assert_same(salt, run)
    history = metrics_of(run)
    assert [m["watched"]["n_kd"] for m in history] == [None, 3, 3, 3, 3, 3]
    assert [m["stage"] for m in history] == [1, 1, 1, 2, 2, 2]
    assert [m["omega"] for m in history] == [0.6] * 3 + [0.0] * 3
    summary, of_salt = (json.loads((x / "summary.json").read_text()) for x in (run, salt))
    assert summary["distill_steps"] == 3
    assert {name: summary[name] for name in COUNTED} == {name: of_salt[name] for name in COUNTED}
    first, second = (
        m["gradient_cosine"] if signal == "cosine" else m["log_perplexity"] - m["teacher_hard"]
        for m in history[:2]
    )
    mean = summary["watched"]["mean"]
    assert mean == pytest.approx((first + second) / 2, rel=1e-5)
    # A run that is resumed in stage 2 needs no teacher, and never gives up its decision.
    shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "6")
    run_train(tmp_path / "moved", schedule=schedule, teacher=str(tmp_path), optimizer=ADAMW)
    assert_same(salt, tmp_path / "moved")


def test_an_adaptive_schedule_that_never_decides_ends_at_its_most(
    run_train: Run, slm: pathlib.Path
) -> None:
    schedule = dataclasses.replace(ADAPTIVE, margin=-1e9)
    run = run_train(schedule=schedule, teacher=str(slm))
    assert [m["stage"] for m in metrics_of(run)] == [1] * 5 + [2]
    assert json.loads((run / "summary.json").read_text())["watched"]["n_kd"] is None


def test_let_leaves_nothing_behind(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """No later checkpoint has its projection; stage 2 is a plain run; the student is like any."""
    checkpoints = CheckpointConfig(save_every=0, keep_steps=(3, 4, 5, 6))
    settings: dict[str, Any] = {"checkpoints": checkpoints, "schedule": NONE}
    let = run_train(teacher=str(slm), alignment=LET, **settings)
    has = [
        "projection" in (let / f"checkpoints/{step}/optimizer/_METADATA").read_text()
        for step in range(3, 7)
    ]
    assert has == [True, False, False, False]
    copy = tmp_path / "checkpoints"
    copy.mkdir()
    (let / "checkpoints" / "4").rename(copy / "4")
    run_train(tmp_path, **settings)
    assert_same(let, tmp_path)
    history, plain = metrics_of(let), run_train(**settings)
    assert [m["stage"] for m in history] == [1, 1, 1, 1, 2, 2]
    assert [m.get("alignment_weight") for m in history] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025, 0.0, 0.0]
    )
    assert "soft_loss" not in history[0]
    for line in history[:4]:
        expected = line["log_perplexity"] - line["alignment_weight"] * line["cosine"]
        assert line["loss"] == pytest.approx(expected, abs=0.1)  # but for the z-loss
    assert history[3]["cosine"] > history[0]["cosine"]
    shapes = [[x.shape for x in params_of(run)] for run in (let, plain)]
    assert shapes[0] == shapes[1]
    summary = json.loads((let / "summary.json").read_text())
    teacher = find_model(slm, None, "teacher").config
    head, projection = 2 * 16 * teacher.padded_vocab_size, 6 * 32 * 16
    per_token = flops.forward_flops_per_token(teacher, 16) - head + projection
    assert summary["teacher_flops"] == 4 * 8 * 16 * per_token
    assert summary["distill_steps"] == 4


def test_lets_teacher_may_have_more_ids(
    run_train: Run, cache: PackedCache, make_cache: Callable[..., PackedCache]
) -> None:
    wider = run_train(cache=str(make_cache(reserved=200).path), steps=1)
    assert find_model(wider, None, "teacher").config.vocab_size == cache.vocabulary_size + 200
    settings: dict[str, Any] = {"teacher": str(wider), "alignment": Alignment(stop=2, layer=2)}
    run = run_train(schedule=NONE, steps=2, **settings)
    assert all("cosine" in line for line in metrics_of(run))
    with pytest.raises(InputError, match=r"The teacher .* was trained with the vocabulary"):
        run_train(schedule=SALT, steps=2, **settings)


def test_a_gate_gives_each_token_its_share_of_omega(run_train: Run, slm: pathlib.Path) -> None:
    gated = losses.LossConfig(teacher_temperature=1.0, z_loss=1e-4, gate=gates.Confidence())
    history, without = (
        metrics_of(run_train(schedule=SALT, teacher=str(slm), **loss))
        for loss in ({"loss": gated}, {})
    )
    assert ["gate" in line for line in history] == [True] * 3 + [False] * 3
    assert 0 < history[0]["gate"] < 1
    assert history[0]["soft_loss"] == without[0]["soft_loss"]
    assert history[0]["loss"] != without[0]["loss"]


def test_options_of_the_compiler_reach_both_steps(
    run_train: Run, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = (("xla_dump_to", str(tmp_path)), ("xla_dump_hlo_as_text", True))
    run_train(schedule=SALT, teacher=str(slm), compiler_options=options)
    assert len([*tmp_path.glob("*.jit_step.*after_optimizations.txt")]) == 2


def test_teacher_memory_is_freed_at_the_switch(
    run_train: Run, slm: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = find_model(slm, None, "teacher").load_params(MeshConfig().make())
    shapes = {p.shape for p in jax.tree.leaves(teacher)}
    del teacher
    alive: list[int] = []
    original = loop.Loop._step

    def step(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        student = {id(x) for x in jax.tree.leaves(result[0])}
        live = [x for x in jax.live_arrays() if x.shape in shapes and id(x) not in student]
        alive.append(sum(x.shape == max(shapes) for x in live))
        return result

    monkeypatch.setattr(loop.Loop, "_step", step)
    run_train(schedule=SALT, teacher=str(slm))
    assert alive == [1, 1, 1, 0, 0, 0]


def test_teacher_is_in_no_checkpoint_but_named_there(run_train: Run, slm: pathlib.Path) -> None:
    baseline = run_train()
    salt = run_train(schedule=SALT, teacher=str(slm), teacher_step=4)
    sizes = [len(params_of(run)) for run in (baseline, salt)]
    assert sizes[0] == sizes[1]
    progress = salt / "checkpoints" / "2" / "progress"
    text = "".join(p.read_text() for p in progress.rglob("*") if p.is_file())
    identity = find_model(slm, 4, "teacher").identity
    assert identity["digest"] in text
    assert '"step": 4' in text


def test_early_checkpoint_is_kept(slm: pathlib.Path) -> None:
    steps = sorted(int(p.name) for p in (slm / "checkpoints").iterdir())
    assert steps == [4, 12]


def test_all_arms_read_the_same_rows_but_salt_ds_in_stage_1(
    run_train: Run,
    slm: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    fed: list[list[int]],
) -> None:
    select(RunFolder(tmp_path, "select"), cache=str(cache.path), rule=RandomRows(m=20, seed=1))
    chosen = set(Selection.open(tmp_path).row_ids.tolist())

    def rows(**settings: Any) -> list[list[int]]:
        fed.clear()
        run_train(**settings)
        return list(fed)

    baseline = rows()
    salt = rows(schedule=SALT, teacher=str(slm))
    rkd = rows(schedule=schedules.Constant(0.5), teacher=str(slm))
    salt_ds = rows(schedule=SALT, teacher=str(slm), selection=str(tmp_path))
    assert baseline == salt == rkd
    assert sorted(flat(baseline)) == list(range(48)), "6 steps of 8 are one epoch of 48 rows"
    assert salt_ds[3:] == baseline[3:]
    assert chosen.issuperset(flat(salt_ds[:3]))
    first_epoch = flat(salt_ds[:3])[:20]
    assert sorted(first_epoch) == sorted(chosen), "every selected row once before any twice"
    alone = rows(selection=str(tmp_path), selection_steps=3)
    assert alone == salt_ds, "selected rows without a teacher are those of SALT_DS"
    assert rows(data_seed=1) != baseline


def test_resumed_run_reads_the_rows_that_were_left(
    run_train: Run, fed: list[list[int]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train()
    straight = list(fed)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run_train(tmp_path)
    fed.clear()
    run_train(tmp_path)
    assert fed == straight[4:]


def test_an_evaluation_after_the_save_of_its_step_is_counted_once(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written first, so that its counters don't have that evaluation yet."""
    straight = run_train(evaluate_every=2)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run_train(tmp_path, evaluate_every=2)
    run_train(tmp_path, evaluate_every=2)
    for _ in range(2):
        for kind in ("train", "eval"):
            expected = {m["step"]: m["evaluation_flops"] for m in metrics_of(straight, kind)}
            found = {m["step"]: m["evaluation_flops"] for m in metrics_of(tmp_path, kind)}
            assert found == expected
        run_train(tmp_path, evaluate_every=2)  # it has finished: nothing is trained


def test_costs_by_stage(run_train: Run, slm: pathlib.Path, cache: PackedCache) -> None:
    run = run_train(schedule=SALT, teacher=str(slm), teacher_step=4, evaluation_rows=7)
    summary = json.loads((run / "summary.json").read_text())
    models = {name: find_model(path, None, name) for name, path in (("run", run), ("slm", slm))}
    assert (summary["stage1_tokens"], summary["stage2_tokens"]) == (3 * 8 * 16, 3 * 8 * 16)
    assert summary["teacher_flops"] == 3 * Cost.of(models["slm"].config, 8, 16).flops
    assert summary["student_flops"] == 6 * 3 * Cost.of(models["run"].config, 8, 16).flops
    assert summary["evaluation_flops"] == 2 * Cost.of(models["run"].config, 7, 16).flops
    assert summary["evaluation_tokens"] == 2 * 7 * 16
    assert summary["scoring_flops"] == 0
    assert all(summary[f"{part}_seconds"] > 0 for part in ("stage1", "evaluation", "compile"))
    counted = metrics_of(run)[2]
    assert counted["stage2_tokens"] == counted["stage2_seconds"] == 0
    early = summary["teacher"]["training_cost"]
    assert early["tokens"] == 4 * 8 * 16
    assert early["train_flops"] == 4 * 3 * Cost.of(models["slm"].config, 8, 16).flops
    assert summary["teacher"]["digest"] == find_model(slm, 4, "teacher").digest


def test_salt_ds_is_charged_for_its_scoring(
    run_train: Run, slm: pathlib.Path, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    shared = {"cache": str(cache.path)}
    score(
        RunFolder(tmp_path / "scores", "score"),
        scorer=str(slm),
        devices=Devices(compilation_cache=""),
        **shared,
    )
    scored = {"scores": str(tmp_path / "scores"), **shared}
    select(RunFolder(tmp_path / "top", "select"), rule=TopRows(m=24), **scored)
    select(RunFolder(tmp_path / "random", "select"), rule=RandomRows(m=24), **shared)
    summaries = {}
    for name, selection in (("salt", None), ("top", "top"), ("random", "random")):
        path = str(tmp_path / selection) if selection else None
        run = run_train(schedule=SALT, teacher=str(slm), selection=path)
        summaries[name] = json.loads((run / "summary.json").read_text())
    cost = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert cost["flops"] == Cost.of(find_model(slm, None, "scorer").config, 48, 16).flops
    assert cost["tokens"] == 48 * 16
    salt, salt_ds = summaries["salt"], summaries["top"]
    assert salt_ds["train_flops"] == salt["train_flops"] + cost["flops"]
    assert salt_ds["scoring_tokens"] == cost["tokens"]
    assert salt_ds["scoring_seconds"] == cost["seconds"] > 0
    assert salt_ds["tokens"] == salt["tokens"]
    assert {name: summaries["random"][name] for name in COUNTED} == {
        name: salt[name] for name in COUNTED
    }


def test_scores_whose_cost_is_not_known_are_not_charged_and_that_is_said(
    run_train: Run,
    write_scores: Callable[..., RowScores],
    slm: pathlib.Path,
    cache: PackedCache,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = {"cache_digest": cache.digest, "split": "train"}
    scores = write_scores(tmp_path / "scores", np.ones(48), **common)
    Selection.write(tmp_path / "top", np.arange(24), how={}, scores=scores, **common)
    run = run_train(
        schedule=SALT, teacher=str(slm), selection=str(tmp_path / "top"), steps=3, evaluate_every=3
    )
    assert json.loads((run / "summary.json").read_text())["scoring_flops"] == 0
    assert "doesn't say what its scores cost" in capsys.readouterr().out


def test_a_checkpoint_with_the_counters_of_another_version_is_refused(
    run_train: Run, tmp_path: pathlib.Path
) -> None:
    run_train(tmp_path)
    progress = tmp_path / "checkpoints" / "6" / "progress" / "metadata"
    content = json.loads(progress.read_text())
    content["counters"] = {"seconds": 1.0, "train_flops": 2.0, "tokens": 3}
    progress.write_text(json.dumps(content))
    (progress.parents[1] / "digests.json").unlink()
    with pytest.raises(InputError, match=r"step 6 .* was saved by another version"):
        run_train(tmp_path)


def test_stops_at_the_limit_of_skipped_updates(run_train: Run) -> None:
    explosive = AdamW(WarmupConstant(1e38), clip_norm=0)
    with pytest.raises(RunFailed, match="max_skipped_updates is 1"):
        run_train(optimizer=explosive, max_skipped_updates=1)


def test_starts_from_a_checkpoint_when_asked(run_train: Run) -> None:
    first = run_train(steps=4)
    second = run_train(
        steps=1,
        initial=str(first),
        optimizer=AdamW(WarmupConstant(1e-9), weight_decay=0),
    )
    for a, b in zip(params_of(first), params_of(second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_starts_from_the_layers_of_a_shallower_model(run_train: Run, slm: pathlib.Path) -> None:
    deep = dataclasses.replace(find_model(slm, None, "model").config, num_layers=5, vocab_size=None)
    still = AdamW(WarmupConstant(1e-9), weight_decay=0)
    start = {"initial": str(slm), "steps": 1, "optimizer": still}
    with pytest.raises(InputError, match=r"num_layers 2 \(the student has 5\)"):
        run_train(model=deep, **start)
    run = run_train(model=deep, stacked=True, **start)
    for a, b in zip(params_of(run), params_of(slm), strict=True):
        np.testing.assert_allclose(a, b[[0, 1, 0, 1, 0]] if len(a) == 5 else b, atol=1e-6)
    wide = dataclasses.replace(deep, embed_dim=32)
    with pytest.raises(InputError, match=r"a model with embed_dim 16 \(the student has 32\)"):
        run_train(model=wide, stacked=True, **start)


def test_learns(slm: pathlib.Path) -> None:
    history = metrics_of(slm)
    assert history[-1]["log_perplexity"] < history[0]["log_perplexity"] - 0.7
    evaluation = metrics_of(slm, "eval")[-1]
    assert evaluation["by_subset"].keys() == {"prose", "code"}
    tokens = [q["tokens"] for q in evaluation["by_subset"].values()]
    assert sum(tokens) == evaluation["evaluated_tokens"] == 150
    assert evaluation["tokens"] == 12 * 8 * 16


def test_reads_ahead_from_any_step(cache: PackedCache) -> None:
    """Step 1,000,000 is as near as step 0, and the same batch as from any other start."""
    split = cache.split("train")
    pipeline = InputPipeline({"cache": split}, 8, 0, RowOrder(None, len(split), seed=3))
    far: Iterator[Any] = pipeline.batches(1_000_000, 1_000_002)
    np.testing.assert_array_equal(next(far)["row_id"], pipeline.batch(1_000_000)["row_id"])
    assert pipeline.draws(1_000_000)[0].epoch == 8_000_000 // 48


def flat(batches: list[list[int]]) -> list[int]:
    return [row_id for batch in batches for row_id in batch]
