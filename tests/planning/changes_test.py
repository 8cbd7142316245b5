"""Which changes are tried, in which order, and which one is chosen."""

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

from salt_jax.planning import changes, topologies
from salt_jax.planning.compile import CompiledStage, Job, Memory, TooLarge
from salt_jax.training import partitioning

LOCAL = topologies.find("local", hbm_gib=1.0)


def of_gib(gib: float) -> CompiledStage:
    return CompiledStage(Memory(int(gib * 2**30), 0, 0, 0, 0), {}, "", 0.0)


def test_order(make_job: Callable[..., Job]) -> None:
    loss = dataclasses.replace(make_job().loss, chunk_tokens=256)
    job = make_job(loss=loss, mesh=partitioning.MeshConfig(data=2))
    tried = [dict(change.settings) for change in changes.candidates(job, LOCAL, 1)]
    parts, chunk = "train.train.stage1_microbatches", "losses.LossConfig.chunk_tokens"
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
    *_, strongest = changes.candidates(job, LOCAL, 2)
    assert strongest.job.microbatches == 4
    assert strongest.job.stage1_microbatches == 1
    assert strongest.job.model.remat == "full"
    assert strongest.job.mesh.make().shape["fsdp"] == 8
    assert strongest.flags.startswith("--gin.train.train.microbatches=4 ")
    # As a shell reads them, with quotes left for gin.
    assert "--gin.decoder.DecoderConfig.remat='full'" in shlex.split(strongest.flags)


def test_nothing_left_to_change(make_job: Callable[..., Job]) -> None:
    model = dataclasses.replace(make_job().model, remat="full")
    job = make_job(model=model, microbatches=4)
    assert list(changes.candidates(job, LOCAL, 2)) == []


def test_the_first_that_fits_is_chosen(make_job: Callable[..., Job]) -> None:
    told: list[tuple[Any, float | None]] = []

    def compile_stage(job: Job, topology: object, stage: int) -> CompiledStage | TooLarge:
        if job.microbatches == 1:
            return TooLarge(9.0, 0.1)
        return of_gib(4.0 / job.microbatches)

    def tried(change: changes.Change, outcome: CompiledStage | TooLarge) -> None:
        told.append((change.settings, getattr(outcome, "needed_gib", None)))

    fit = changes.find_change(make_job(), LOCAL, 2, compile_stage, tried)
    assert fit is not None
    assert fit.change.settings == {"train.train.microbatches": 4}
    assert [settings for settings, _ in told] == [
        {"train.train.microbatches": 2},
        {"train.train.microbatches": 4},
    ]


def test_none_fits(make_job: Callable[..., Job]) -> None:
    tried: list[changes.Change] = []
    fit = changes.find_change(
        make_job(), LOCAL, 2, lambda *_: of_gib(2.0), lambda change, _: tried.append(change)
    )
    assert fit is None
    assert tried == list(changes.candidates(make_job(), LOCAL, 2))


def test_fits() -> None:
    assert changes.fits(of_gib(1.0), LOCAL)
    assert not changes.fits(of_gib(1.001), LOCAL)
    assert changes.fits(of_gib(99.0), topologies.find("local"))  # nothing is known of a CPU's
    assert not changes.fits(TooLarge(None, 0.0), topologies.find("local"))
