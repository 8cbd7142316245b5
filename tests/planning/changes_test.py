"""Which changes are tried, in which order, and which one is chosen."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from salt_jax.distill.losses import LossConfig
from salt_jax.planning import changes, topologies
from salt_jax.planning.compile import CompiledStage, Job, Memory, check_batch
from salt_jax.planning.estimate import StageCost
from salt_jax.planning.stage_plan import StagePlan
from salt_jax.planning.topologies import GIB, Topology
from salt_jax.training import partitioning

LOCAL = topologies.find("local", hbm_gib=1.0)
PARTS, STAGE1 = "config.Devices.microbatches", "config.Devices.stage1_microbatches"
CHUNK, REMAT = "losses.LossConfig.chunk_tokens", "decoder.DecoderConfig.remat"
FSDP = {f"partitioning.MeshConfig.{axis}": 1 for axis in ("slice", "data", "tensor")}
FSDP["partitioning.MeshConfig.fsdp"] = -1


def planned(job: Job, stage: int, gib: float | None, seconds: float = 1.0) -> StagePlan:
    """A stage that needs so much; None was refused by the compiler."""
    if gib is None:
        return StagePlan(job, LOCAL, stage, CompiledStage(0.0, 9.0))
    compiled = CompiledStage(0.0, gib, Memory(int(gib * GIB), 0, 0, 0))
    roofline = {"compute": 0.0, "memory": seconds, "overlapped": 0.0, "waited": 0.0}
    return StagePlan(job, LOCAL, stage, compiled, StageCost(0.0, {}, 0.0, roofline))


def planner(gib: Callable[[Job, int], float | None]) -> changes.Plan:
    return lambda job, topology, stage: planned(job, stage, gib(job, stage))


def stages_of(job: Job, plan: changes.Plan) -> Mapping[int, StagePlan]:
    return {stage: plan(job, LOCAL, stage) for stage in job.stages}


def remat(job: Job, policy: str) -> Job:
    student = dataclasses.replace(job.student, remat=policy)
    return dataclasses.replace(job, config=dataclasses.replace(job.config, model=student))


def tried_for(job: Job, stage: int, topology: Topology = LOCAL) -> list[changes.Change]:
    return list(changes.candidates(changes.Change({}, job), topology, stage))


def test_order(make_job: Callable[..., Job]) -> None:
    method = dataclasses.replace(make_job().config.method, loss=LossConfig(chunk_tokens=256))
    job = make_job(method=method, devices={"mesh": partitioning.MeshConfig(data=2)})
    assert [dict(change.settings) for change in tried_for(job, 1)] == [
        {STAGE1: 2},
        {STAGE1: 4},
        {CHUNK: 128},
        {CHUNK: 64},
        {REMAT: "minimal"},
        {REMAT: "attention"},
        {REMAT: "attention_output"},
        {REMAT: "full"},
        FSDP,
        {STAGE1: 4, CHUNK: 64},
        {STAGE1: 4, CHUNK: 64, REMAT: "full"},
        {STAGE1: 4, CHUNK: 64, REMAT: "full", **FSDP},
    ]


def test_jobs_have_the_settings(make_job: Callable[..., Job]) -> None:
    job = make_job(devices={"mesh": partitioning.MeshConfig(data=2)})
    *_, strongest = tried_for(job, 2)
    assert strongest.job.microbatches_of(2) == 4
    assert strongest.job.microbatches_of(1) == 1
    assert strongest.job.student.remat == "full"
    assert strongest.job.mesh(LOCAL).shape["fsdp"] == 8
    # Without the second flag stage 1 would be split as stage 2 is.
    assert strongest.flags.startswith("--stage1_microbatches=1 --microbatches=4 ")
    # As a shell reads them, with quotes left for gin.
    assert "--gin.decoder.DecoderConfig.remat='full'" in shlex.split(strongest.flags)


def test_together_with_the_mesh_where_its_devices_leave_no_room_for_microbatches(
    make_job: Callable[..., Job],
) -> None:
    """Over 4 of 8 devices (tensor 2) a batch of 32 takes 8 microbatches, over all of them 4."""
    split = partitioning.MeshConfig(fsdp=4, tensor=2)
    tried = tried_for(make_job(devices={"mesh": split}), 2)
    assert {PARTS: 8}.items() <= tried[2].settings.items()
    last = tried[-1]
    assert last.job.mesh(LOCAL).shape["fsdp"] == 8
    assert last.job.microbatches_of(2) == last.settings[PARTS] == 4
    assert last.job.student.remat == "full"
    eight = {"mesh": split, "microbatches": 8, "stage1_microbatches": 1}
    mesh = next(
        c for c in tried_for(make_job(devices=eight), 1) if FSDP.items() <= c.settings.items()
    )
    assert (mesh.job.microbatches_of(2), mesh.job.microbatches_of(1)) == (4, 1)
    for job in (last.job, mesh.job):
        for stage in (1, 2):
            check_batch(job, LOCAL, stage)


def test_nothing_left_to_change(make_job: Callable[..., Job]) -> None:
    job = make_job(devices={"microbatches": 4})
    assert tried_for(remat(job, "full"), 2) == []


def test_the_first_that_fits_is_chosen(make_job: Callable[..., Job]) -> None:
    plan = planner(
        lambda job, _: None if job.microbatches_of(2) == 1 else 4 / job.microbatches_of(2)
    )
    told: list[tuple[int, Any, bool | None]] = []
    found = changes.find_fit(
        stages_of(make_job(teacher=None), plan),
        plan,
        lambda change, outcome: told.append((outcome.stage, change.settings, outcome.fits)),
    )
    assert found is not None
    assert found.change.settings == {PARTS: 4}
    assert found.stages[2].compiled.needed_gib == 1.0
    assert told == [(2, {PARTS: 2}, False), (2, {PARTS: 4}, True)]


def test_what_one_stage_takes_holds_for_the_other(make_job: Callable[..., Job]) -> None:
    """Stage 1 needs full recomputation; stage 2, which would fit without, is compiled with it."""

    def gib(job: Job, stage: int) -> float:
        full = job.student.remat == "full"
        return (0.9 if full else 2.0) if stage == 1 else (0.2 if full else 0.5)

    plan = planner(gib)
    found = changes.find_fit(stages_of(make_job(), plan), plan, lambda *_: None)
    assert found is not None
    assert found.change.settings == {REMAT: "full"}
    assert [found.stages[stage].compiled.needed_gib for stage in (1, 2)] == [0.9, 0.2]


def test_changes_for_both_stages_add_up(make_job: Callable[..., Job]) -> None:
    plan = planner(lambda job, stage: 2.0 / job.microbatches_of(stage))
    found = changes.find_fit(stages_of(make_job(), plan), plan, lambda *_: None)
    assert found is not None
    assert found.change.settings == {STAGE1: 2, PARTS: 2}
    assert [found.change.job.microbatches_of(stage) for stage in (1, 2)] == [2, 2]


def test_none_fits(make_job: Callable[..., Job]) -> None:
    tried: list[changes.Change] = []
    job, plan = make_job(teacher=None), planner(lambda *_: 2.0)
    assert changes.find_fit(stages_of(job, plan), plan, lambda c, _: tried.append(c)) is None
    assert tried == tried_for(job, 2)


def test_fits(make_job: Callable[..., Job]) -> None:
    job = make_job()
    assert planned(job, 2, 1.0).fits
    assert not planned(job, 2, 1.001).fits
    # Nothing is known of a CPU's memory.
    unknown = topologies.find("local")
    assert dataclasses.replace(planned(job, 2, 99.0), topology=unknown).fits is None
    assert dataclasses.replace(planned(job, 2, None), topology=unknown).fits is False


def faster(job: Job, gib: float, seconds: Callable[[Job], float]) -> Any:
    """What is found for a run whose stages need so much with any settings, and what is tried."""
    tried: list[tuple[int, dict[str, Any]]] = []

    def plan(job: Job, topology: Topology, stage: int) -> StagePlan:
        return planned(job, stage, gib, seconds(job))

    found = changes.find_faster(
        stages_of(job, plan),
        plan,
        lambda change, outcome: tried.append((outcome.stage, dict(change.settings))),
    )
    return found, tried


def test_idle_memory_is_used(make_job: Callable[..., Job]) -> None:
    """Less recomputation, then fewer microbatches, then larger chunks, while it is faster."""
    method = dataclasses.replace(make_job().config.method, loss=LossConfig(chunk_tokens=8))
    job = remat(make_job(method=method, devices={"microbatches": 2}), "full")

    def seconds(job: Job) -> float:
        again = {"minimal": 0.8, "attention": 0.9}.get(job.student.remat, 1.0)
        return again * (1.0 - 0.1 / job.microbatches_of(2))

    found, tried = faster(job, 0.1, seconds)
    settings = {REMAT: "minimal", STAGE1: 1, PARTS: 1}
    assert found.change.settings == settings
    assert found.change.job.student.remat == "minimal"
    # The stage with more steps first; a chunk of all 64 tokens of a device gains nothing.
    assert [stage for stage, _ in tried] == [2, 1] * 3
    assert tried[-1][1] == {**settings, CHUNK: 64}


def test_changes_that_cannot_fit_are_not_compiled(make_job: Callable[..., Job]) -> None:
    """Kept by minimal, 2 layers · 64 tokens · (2 · 64 + 4 · 64 + 2 · 128 - 64) · 4 bytes more."""
    job = remat(make_job(), "full")
    more = 2 * 64 * (64 + 4 * 64 + 2 * 128) * 4 / GIB
    assert faster(job, 1.0 - more, lambda _: 1.0)[1][0] == (2, {REMAT: "minimal"})
    assert faster(job, 1.0 - 0.99 * more, lambda _: 1.0)[1][0] == (2, {REMAT: "attention"})
    assert faster(job, 1.0, lambda _: 1.0) == (None, [])


@pytest.mark.parametrize("remat_policy", ["full", "minimal"])
def test_nothing_is_proposed_that_gains_nothing(
    make_job: Callable[..., Job], remat_policy: str
) -> None:
    found, tried = faster(remat(make_job(), remat_policy), 0.1, lambda _: 1.0)
    assert found is None
    assert len(tried) == (2 if remat_policy == "full" else 0)


def test_nothing_is_tried_that_cannot_gain(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where computing takes longest, neither chunks nor microbatches are tried."""
    method = dataclasses.replace(make_job().config.method, loss=LossConfig(chunk_tokens=8))
    job = remat(make_job(method=method, devices={"microbatches": 2}), "minimal")
    assert len(faster(job, 0.1, lambda _: 1.0)[1]) == 4
    monkeypatch.setattr(changes, "_limits", lambda stages: {"compute"})
    assert faster(job, 0.1, lambda _: 1.0) == (None, [])
    monkeypatch.undo()
    roofline = {"compute": 2.0, "memory": 1.0, "overlapped": 0.0, "waited": 0.1}
    stage = dataclasses.replace(planned(job, 2, 0.1), cost=StageCost(0.0, {}, 0.0, roofline))
    assert changes._limits({2: stage}) == {"compute", "waited"}
