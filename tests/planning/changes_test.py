"""Which changes are tried, in which order, and which one is chosen."""

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

from salt_jax.planning import changes, topologies
from salt_jax.planning.compile import CompiledStage, Job, Memory, TooLarge, check_batch
from salt_jax.training import partitioning

LOCAL = topologies.find("local", hbm_gib=1.0)


def of_gib(gib: float) -> CompiledStage:
    return CompiledStage(Memory(int(gib * 2**30), 0, 0, 0, 0), {}, "", 0.0)


def test_order(make_job: Callable[..., Job]) -> None:
    loss = dataclasses.replace(make_job().loss, chunk_tokens=256)
    job = make_job(loss=loss, mesh=partitioning.MeshConfig(data=2))
    tried = [
        dict(change.settings) for change in changes.candidates(changes.Change({}, job), LOCAL, 1)
    ]
    parts, chunk = "config.Devices.stage1_microbatches", "losses.LossConfig.chunk_tokens"
    remat = "decoder.DecoderConfig.remat"
    mesh = {f"partitioning.MeshConfig.{axis}": 1 for axis in ("slice", "data", "tensor")}
    mesh["partitioning.MeshConfig.fsdp"] = -1
    assert tried == [
        {parts: 2},
        {parts: 4},
        {chunk: 128},
        {chunk: 64},
        {remat: "minimal"},
        {remat: "attention"},
        {remat: "attention_output"},
        {remat: "full"},
        mesh,
        {parts: 4, chunk: 64},
        {parts: 4, chunk: 64, remat: "full"},
        {parts: 4, chunk: 64, remat: "full", **mesh},
    ]


def test_jobs_have_the_settings(make_job: Callable[..., Job]) -> None:
    job = make_job(mesh=partitioning.MeshConfig(data=2))
    *_, strongest = changes.candidates(changes.Change({}, job), LOCAL, 2)
    assert strongest.job.microbatches == 4
    assert strongest.job.stage1_microbatches == 1
    assert strongest.job.model.remat == "full"
    assert strongest.job.mesh.make().shape["fsdp"] == 8
    # Without the second flag stage 1 would be split as stage 2 is.
    assert strongest.flags.startswith("--stage1_microbatches=1 --microbatches=4 ")
    # As a shell reads them, with quotes left for gin.
    assert "--gin.decoder.DecoderConfig.remat='full'" in shlex.split(strongest.flags)


def test_together_with_the_mesh_where_its_devices_leave_no_room_for_microbatches(
    make_job: Callable[..., Job],
) -> None:
    """Over 4 of 8 devices (tensor 2) a batch of 32 takes 8 microbatches, over all of them 4."""
    job = make_job(mesh=partitioning.MeshConfig(fsdp=4, tensor=2))
    tried = list(changes.candidates(changes.Change({}, job), LOCAL, 2))
    assert {"config.Devices.microbatches": 8}.items() <= tried[2].settings.items()
    last = tried[-1]
    assert last.job.mesh.make().shape["fsdp"] == 8
    assert last.job.microbatches == last.settings["config.Devices.microbatches"] == 4
    assert last.job.model.remat == "full"
    alone = make_job(mesh=partitioning.MeshConfig(fsdp=4, tensor=2), microbatches=8)
    (mesh,) = changes._mesh(changes.Change({}, alone), LOCAL, 1)
    assert (mesh.job.microbatches, mesh.job.stage1_microbatches) == (4, 1)
    for job in (last.job, mesh.job):
        for stage in (1, 2):
            check_batch(job, LOCAL, stage)


def test_nothing_left_to_change(make_job: Callable[..., Job]) -> None:
    model = dataclasses.replace(make_job().model, remat="full")
    job = make_job(model=model, microbatches=4)
    assert list(changes.candidates(changes.Change({}, job), LOCAL, 2)) == []


def test_the_first_that_fits_is_chosen(make_job: Callable[..., Job]) -> None:
    told: list[tuple[int, Any, float | None]] = []

    def compile_stage(job: Job, topology: object, stage: int) -> CompiledStage | TooLarge:
        if job.microbatches == 1:
            return TooLarge(9.0, 0.1)
        return of_gib(4.0 / job.microbatches)

    def tried(stage: int, change: changes.Change, outcome: CompiledStage | TooLarge) -> None:
        told.append((stage, change.settings, getattr(outcome, "needed_gib", None)))

    job = make_job(teacher=None)
    stages = {2: compile_stage(job, LOCAL, 2)}
    fit = changes.find_change(job, LOCAL, stages, compile_stage, tried)
    assert fit is not None
    assert fit.change.settings == {"config.Devices.microbatches": 4}
    assert fit.stages == {2: of_gib(1.0)}
    assert told == [
        (2, {"config.Devices.microbatches": 2}, None),
        (2, {"config.Devices.microbatches": 4}, None),
    ]


def test_what_one_stage_takes_holds_for_the_other(make_job: Callable[..., Job]) -> None:
    """Stage 1 needs full recomputation; stage 2, which would fit without, is compiled with it."""

    def compile_stage(job: Job, topology: object, stage: int) -> CompiledStage | TooLarge:
        if stage == 1:
            return of_gib(0.9 if job.model.remat == "full" else 2.0)
        return of_gib({"none": 0.5, "full": 0.2}[job.model.remat])

    job = make_job()
    stages = {stage: compile_stage(job, LOCAL, stage) for stage in (1, 2)}
    fit = changes.find_change(job, LOCAL, stages, compile_stage, lambda *_: None)
    assert fit is not None
    assert fit.change.settings == {"decoder.DecoderConfig.remat": "full"}
    assert fit.stages == {1: of_gib(0.9), 2: of_gib(0.2)}


def test_changes_for_both_stages_add_up(make_job: Callable[..., Job]) -> None:
    def compile_stage(job: Job, topology: object, stage: int) -> CompiledStage | TooLarge:
        return of_gib(2.0 / job.microbatches_of(stage))

    job = make_job()
    stages = {stage: compile_stage(job, LOCAL, stage) for stage in (1, 2)}
    fit = changes.find_change(job, LOCAL, stages, compile_stage, lambda *_: None)
    assert fit is not None
    assert fit.change.settings == {
        "config.Devices.stage1_microbatches": 2,
        "config.Devices.microbatches": 2,
    }
    assert (fit.change.job.stage1_microbatches, fit.change.job.microbatches) == (2, 2)


def test_none_fits(make_job: Callable[..., Job]) -> None:
    tried: list[changes.Change] = []
    job = make_job()
    fit = changes.find_change(
        job, LOCAL, {2: of_gib(2.0)}, lambda *_: of_gib(2.0), lambda _, c, __: tried.append(c)
    )
    assert fit is None
    assert tried == list(changes.candidates(changes.Change({}, job), LOCAL, 2))


def test_fits() -> None:
    assert changes.fits(of_gib(1.0), LOCAL)
    assert not changes.fits(of_gib(1.001), LOCAL)
    # Nothing is known of a CPU's memory.
    assert changes.fits(of_gib(99.0), topologies.find("local")) is None
    assert changes.fits(TooLarge(None, 0.0), topologies.find("local")) is False
