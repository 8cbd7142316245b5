"""FLOPs, the roofline and the run's totals, against what one works out by hand."""

import dataclasses
from collections.abc import Callable

import jax
import pytest

from salt_jax.distill.alignment import Alignment
from salt_jax.distill.schedules import NoDistillation
from salt_jax.planning import estimate, hlo
from salt_jax.planning.compile import Job
from salt_jax.planning.topologies import Chip, Topology
from salt_jax.training import flops
from salt_jax.training.config import Monitoring

# 197 TFLOP/s.
CHIP = Chip("TPU v5 lite", 16.0, memory_bandwidth=2e13, link_bandwidth=2e12, network_bandwidth=3e9)
# A loop of ten: each time an all-gather of 1,024 bytes that other work hides and an all-reduce that
# it doesn't, on four devices.
MODULE = hlo.parse("""HloModule m, num_partitions=4

%body (c: (s32[], f32[256])) -> (s32[], f32[256]) {
  %c = (s32[], f32[256]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[256] get-tuple-element(%c), index=1
  %s = (f32[256], f32[1024]) all-gather-start(%x), replica_groups=[1,4]<=[4]
  %d = f32[1024] all-gather-done(%s)
  %r = f32[256] all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %t = (s32[], f32[256]) tuple(%i, %r)
}

%condition (c: (s32[], f32[256])) -> pred[] {
  %c = (s32[], f32[256]) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (c: (s32[], f32[256])) -> (s32[], f32[256]) {
  %c = (s32[], f32[256]) parameter(0)
  ROOT %w = (s32[], f32[256]) while(%c), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
}
""")


def chips(chip: Chip, count: int, slices: int = 1) -> Topology:
    return Topology("chips", (jax.devices()[0],) * count, chip, slices)


def test_flops_are_the_formula(make_job: Callable[..., Job]) -> None:
    job = make_job()
    assert job.teacher is not None
    tokens = 32 * 16
    plain = flops.train_flops_per_token(job.student, 16) * tokens
    teacher = flops.forward_flops_per_token(job.teacher, 16) * tokens
    assert estimate.flops_per_step(job, 2) == plain
    assert estimate.flops_per_step(job, 1) == plain + teacher
    assert estimate.hardware_flops_per_step(job, 2) == plain  # remat "none"
    full = make_job(model=dataclasses.replace(job.student, remat="full"))
    again = flops.hardware_train_flops_per_token(full.student, 16) * tokens
    assert estimate.hardware_flops_per_step(full, 2) == again > plain
    assert estimate.hardware_flops_per_step(full, 1) == again + teacher
    assert estimate.flops_per_step(full, 1) == plain + teacher


def test_lets_teacher_has_no_head_and_trains_a_projection(make_job: Callable[..., Job]) -> None:
    taught = dataclasses.replace(
        make_job().config.method, schedule=NoDistillation(), alignment=Alignment(25, layer=1)
    )
    job = make_job(method=taught)
    assert job.teacher is not None
    assert job.config.stage1_steps == 25
    forward = flops.forward_flops_per_token(job.teacher, 16) - 2 * 32 * 1024
    added = estimate.flops_per_step(job, 1) - estimate.flops_per_step(job, 2)
    assert added == (forward + 6 * 64 * 32) * 32 * 16


def test_roofline(make_job: Callable[..., Job]) -> None:
    job = make_job()
    cost = estimate.estimate_cost(job, 2, chips(CHIP, 4), MODULE)
    gathered, reduced = 10 * 1024 * 3, 10 * 2 * 1024 * 3 / 4
    assert cost.collective_bytes == {"all-gather": gathered, "all-reduce": reduced}
    assert cost.seconds == pytest.approx(
        {
            "compute": estimate.hardware_flops_per_step(job, 2)
            / 4
            / (estimate.COMPUTE_FRACTION * 197e12),
            "memory": cost.memory_bytes / (estimate.MEMORY_FRACTION * 2e13),
            "overlapped": gathered / (estimate.LINK_FRACTION * 2e12),
            "waited": reduced / (estimate.LINK_FRACTION * 2e12),
        }
    )
    assert cost.seconds is not None
    assert cost.step_seconds == cost.seconds["compute"] + cost.seconds["waited"]
    slow_memory = dataclasses.replace(CHIP, memory_bandwidth=1e3)
    cost = estimate.estimate_cost(job, 2, chips(slow_memory, 4), MODULE)
    assert cost.seconds is not None
    assert cost.step_seconds == cost.seconds["memory"] + cost.seconds["waited"]


def test_what_goes_between_slices_waits_for_the_network(make_job: Callable[..., Job]) -> None:
    """Two slices of two: half of the sum goes to the other slice, and each gathers its arrays."""
    cost = estimate.estimate_cost(make_job(), 2, chips(CHIP, 4, slices=2), MODULE)
    alone = estimate.estimate_cost(make_job(), 2, chips(CHIP, 4), MODULE)
    assert cost.collective_bytes == alone.collective_bytes
    gathered, reduced = 10 * 1024, 10 * 2 * 1024 / 2 / 2
    assert cost.network_bytes == gathered + reduced
    link, network = (estimate.LINK_FRACTION * speed for speed in (2e12, 3e9))
    assert cost.seconds is not None
    assert cost.seconds["overlapped"] == pytest.approx(2 * gathered / link + gathered / network)
    assert cost.seconds["waited"] == pytest.approx(2 * reduced / link + reduced / network)


def test_no_time_without_peaks(make_job: Callable[..., Job]) -> None:
    cost = estimate.estimate_cost(make_job(), 1, chips(Chip("cpu"), 8), MODULE)
    assert cost.step_seconds is None
    run = estimate.estimate_run(make_job(), 8, {1: None, 2: None})
    assert run["days"] is run["baseline_chip_hours"] is None
    run = estimate.estimate_run(make_job(), 8, {1: None, 2: 2.0})
    assert run["chip_hours"] is run["teacher_overhead"] is None
    assert run["baseline_days"] == 200 / 86_400


def test_run_with_and_without_teacher(make_job: Callable[..., Job]) -> None:
    job = make_job()
    run = estimate.estimate_run(job, 8, {1: 3.0, 2: 2.0})
    assert (run["steps"], run["stage1_steps"]) == (100, 25)
    assert run["days"] == pytest.approx((25 * 3.0 + 75 * 2.0) / 86_400)
    assert run["baseline_days"] == pytest.approx(200 / 86_400)
    assert run["teacher_overhead"] == pytest.approx(0.125)
    assert run["chip_hours"] == pytest.approx(225 * 8 / 3600)
    assert run["baseline_chip_hours"] == pytest.approx(200 * 8 / 3600)
    assert run["cost"] is run["baseline_cost"] is None
    priced = dataclasses.replace(job.config, monitoring=Monitoring(price=1.5))
    costs = estimate.estimate_run(dataclasses.replace(job, config=priced), 8, {1: 3.0, 2: 2.0})
    assert costs["cost"] == pytest.approx(1.5 * 225 * 8 / 3600)
    assert costs["baseline_cost"] == pytest.approx(1.5 * 200 * 8 / 3600)
    plain, distilling = (estimate.flops_per_step(job, stage) for stage in (2, 1))
    assert run["baseline_flops"] == 100 * plain
    assert run["flops"] == pytest.approx(75 * plain + 25 * distilling)
    run = estimate.estimate_run(make_job(teacher=None), 8, {2: 2.0})
    assert run["days"] == run["baseline_days"] == pytest.approx(200 / 86_400)
    assert run["flops"] == run["baseline_flops"]
    assert run["teacher_overhead"] == 0
