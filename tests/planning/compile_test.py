"""Compiled stages: memory as XLA reports it, its parts, and what does not fit."""

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Callable

import jax
import pytest

from salt_jax.distill.alignment import Alignment
from salt_jax.distill.losses import LossConfig
from salt_jax.errors import InputError
from salt_jax.planning import hlo, topologies
from salt_jax.planning.collectives import collectives
from salt_jax.planning.compile import (
    CompiledStage,
    Job,
    Memory,
    compile_stage,
    loss_bytes,
    needed_gib,
)
from salt_jax.planning.stage_plan import plan_stage
from salt_jax.training import partitioning
from salt_jax.training.learning_rates import WarmupStableDecay
from salt_jax.training.optimizers import Muon
from salt_jax.training.teacher import projection_of
from salt_jax.training.train_state import abstract_sharded_params, make_layout
from salt_jax.training.train_step import lower_step

LOCAL = topologies.find("local")


def memory(result: CompiledStage) -> Memory:
    assert result.memory is not None
    assert result.needed_gib == result.memory.peak / 2**30
    return result.memory


@pytest.mark.parametrize(
    ("stage", "alignment"),
    [(1, None), (2, None), (1, Alignment(25, layer=1)), (2, Alignment(25, layer=1))],
    ids=["1", "2", "1 of LET", "2 of LET"],
)
def test_memory_is_that_of_the_step_that_trains(
    make_job: Callable[..., Job], stage: int, alignment: Alignment | None
) -> None:
    job = make_job(devices={"stage1_microbatches": 2})
    method = dataclasses.replace(job.config.method, alignment=alignment)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, method=method))
    mesh, config = partitioning.MeshConfig().make(), job.config
    projection = projection_of(config, job.student, job.teacher if stage == 1 else None)
    assert (projection is None) == (alignment is None or stage == 2)
    optimizer = config.optimizer.make(100, job.student)
    layout = make_layout(job.student, optimizer, mesh, projection=projection)
    assert job.teacher is not None
    teacher = abstract_sharded_params(job.teacher, mesh, config.devices.rules, "bfloat16")
    arguments = (2, job.teacher, teacher) if stage == 1 else (1,)
    given = {"alignment": alignment} if stage == 1 else {}
    program = lower_step(layout, config.method.loss, (32, 16), *arguments, **given).compile()
    expected = program.memory_analysis()
    result = compile_stage(job, LOCAL, stage)
    assert memory(result).arguments == expected.argument_size_in_bytes
    assert memory(result).temporaries == expected.temp_size_in_bytes
    assert memory(result).peak == (
        expected.argument_size_in_bytes
        + expected.temp_size_in_bytes
        + expected.output_size_in_bytes
        - expected.alias_size_in_bytes
    )
    transfers = [collectives(hlo.parse(text)) for text in (result.hlo, program.as_text())]
    assert transfers[0] == transfers[1] != []


def test_parts_add_up_to_the_peak(make_job: Callable[..., Job]) -> None:
    job = make_job()
    result, plain = (compile_stage(job, LOCAL, stage) for stage in (1, 2))
    for stage in (result, plain):
        assert sum(stage.parts.values()) == pytest.approx(memory(stage).peak)
        assert all(value >= 0 for value in stage.parts.values())
    # All parameters of these shapes are split over the eight devices.
    assert result.parts["student"] == pytest.approx(job.student.num_parameters * 4 / 8, rel=0.02)
    assert result.parts["optimizer"] == pytest.approx(2 * result.parts["student"], rel=0.01)
    assert job.teacher is not None
    assert result.parts["teacher"] == pytest.approx(job.teacher.num_parameters * 2 / 8, rel=0.02)
    assert plain.parts["teacher"] == 0
    assert result.parts["batch"] == 32 * 16 / 8 * 5 * 4


def test_any_optimizers_memory_is_in_the_plan(make_job: Callable[..., Job]) -> None:
    """Muon keeps one moment of the blocks' kernels, and Adam's two of the rest."""
    job = make_job(optimizer=Muon(WarmupStableDecay(1e-3)))
    parts = compile_stage(job, LOCAL, 2).parts
    kernels = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert parts["student"] - parts["optimizer"] / 2 == pytest.approx(kernels * 4 / 8 / 2, rel=0.02)


def test_loss_bytes_follow_chunk_vocabulary_and_teacher(make_job: Callable[..., Job]) -> None:
    job = make_job()
    mesh = partitioning.MeshConfig().make()
    assert loss_bytes(job, 2, mesh) == 1024 * (64 * 8 + 64 * 8)  # V · (D · (4 + 4) + C · (4 + 4))
    assert loss_bytes(job, 1, mesh) == loss_bytes(job, 2, mesh) + 1024 * (32 * 4 + 64 * 4)
    method = dataclasses.replace(job.config.method, loss=LossConfig(chunk_tokens=8))
    small = make_job(method=method)
    assert loss_bytes(small, 2, mesh) == 1024 * (64 * 8 + 8 * 8)
    # A device has 16 · 32 / 8 tokens, and a quarter of them in each of four microbatches.
    parts = make_job(devices={"microbatches": 4})
    assert loss_bytes(parts, 2, mesh) == 1024 * (64 * 8 + 16 * 8)
    split = partitioning.MeshConfig(fsdp=4, tensor=2).make()
    assert loss_bytes(job, 2, split) == 512 * (64 * 8 + 64 * 8)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (22.23G) exceeds available HBM (15.75G).",
            22.23,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.48G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.73G.\n\nTotal hbm usage >= 17.98G:",
            17.98,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.0M of 256.0M hbm.", 0.5),
        ("RESOURCE_EXHAUSTED: (1.06T)", None),
    ],
)
def test_sizes_in_errors(message: str, expected: float | None) -> None:
    assert needed_gib(message) == expected


def test_a_batch_that_cannot_be_split(make_job: Callable[..., Job]) -> None:
    with pytest.raises(InputError, match=r"batch_size 32 .* 8 devices of local in 3 microbatches"):
        compile_stage(make_job(devices={"microbatches": 3}), LOCAL, 2)


def test_other_errors_of_the_compiler_are_not_taken_for_too_large(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("salt_jax.planning.compile.lower_step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_stage(make_job(), LOCAL, 2)


@pytest.mark.usefixtures("libtpu")
def test_for_tpus_that_are_not_there(make_job: Callable[..., Job]) -> None:
    topology = topologies.find("v5e:2x2")
    results = [compile_stage(make_job(), topology, stage) for stage in (1, 2)]
    for result in results:
        assert "T(8,128)" in result.hlo  # a TPU's tiles
        assert 0 < memory(result).peak < 2**28
        assert memory(result).arguments < memory(result).peak == memory(result).compiler_peak
        assert sum(result.parts.values()) == pytest.approx(memory(result).peak)


@pytest.mark.usefixtures("libtpu")
def test_two_slices_exchange_gradients_over_the_network(make_job: Callable[..., Job]) -> None:
    """A TPU's program is that of one slice, which sends through its hosts, once a step."""
    job = make_job(devices={"mesh": partitioning.MeshConfig(slice=2), "microbatches": 2})
    plan = plan_stage(job, topologies.find("v5e:2x2*2"), 2)
    assert plan.cost is not None
    gradients = plan.compiled.parts["student"]  # in float32, as the parameters are
    assert plan.cost.network_bytes >= gradients
    transfers = collectives(hlo.parse(plan.compiled.hlo), 2, 8)
    assert {transfer.times for transfer in transfers if transfer.network_bytes} == {1}
    one = plan_stage(make_job(), topologies.find("v5e:2x2"), 2)
    assert one.cost is not None
    assert one.cost.network_bytes == 0


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_sparse_cores_scatter_the_heads_gradient(make_job: Callable[..., Job]) -> None:
    """libtpu makes an all-reduce of it otherwise; hardware/sparse_core.gin has the options."""
    file = pathlib.Path(__file__).parents[2] / "gin" / "hardware" / "sparse_core.gin"
    options = tuple((name, True) for name in re.findall(r"'(xla_\w+)', True", file.read_text()))
    job = make_job(teacher=None, devices={"compiler_options": options})
    plan = plan_stage(job, topologies.find("v6e:4x4"), 2)
    assert plan.cost is not None
    head = job.student.padded_vocab_size * job.student.embed_dim * 4  # in float32
    assert plan.cost.collective_bytes["reduce-scatter"] == head * 15 / 16


@pytest.mark.usefixtures("libtpu")
def test_an_option_that_a_compiler_refuses(make_job: Callable[..., Job]) -> None:
    name = "xla_tpu_enable_sparse_core_reduce_scatter_v2"
    for topology in (LOCAL, topologies.find("v6e:2x2")):
        job = make_job(devices={"compiler_options": ((name, "maybe"),)})
        with pytest.raises(InputError, match=f"{name}.*change --compiler_options"):
            compile_stage(job, topology, 2)


@pytest.mark.usefixtures("libtpu")
def test_too_large_for_a_tpu(make_job: Callable[..., Job]) -> None:
    huge = dataclasses.replace(make_job().student, vocab_size=2**20, embed_dim=4096, num_heads=32)
    result = compile_stage(make_job(model=huge), topologies.find("v5e:2x2"), 2)
    assert result.memory is None
    assert result.needed_gib is not None
    # Parameters, AdamW's two moments and gradients over four chips, at the least.
    assert result.needed_gib > 4 * 2**20 * 4096 * 4 / 4 / 2**30


@pytest.mark.usefixtures("cuda_plugin")
def test_for_gpus_that_are_not_there(make_job: Callable[..., Job]) -> None:
    """With cuDNN's attention, whose workspace XLA does not know of."""
    topology = topologies.find("h100:4")
    model = dataclasses.replace(make_job().student, dtype="bfloat16")
    plans = {
        backend: plan_stage(
            make_job(model=dataclasses.replace(model, attention_backend=backend)), topology, 2
        )
        for backend in ("auto", "xla")
    }
    assert "__cudnn$fmha" in plans["auto"].compiled.hlo
    assert "__cudnn$fmha" not in plans["xla"].compiled.hlo
    for plan in plans.values():
        assert plan.unread is None
        assert plan.fits
        assert plan.step_seconds is not None
        assert plan.cost is not None
        assert plan.cost.collective_bytes["all-gather"] > 0
    asking = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    assert asking.check_cudnn_version.__name__ == "check_cudnn_version"
