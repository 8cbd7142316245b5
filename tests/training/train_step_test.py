"""The step: sharded equals single, accumulated equals whole, non-finite updates leave no trace."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import RowOrder
from salt_jax.distill.alignment import Alignment
from salt_jax.distill.losses import LossConfig
from salt_jax.models import decoder
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning import hlo
from salt_jax.planning.collectives import collectives
from salt_jax.training import partitioning
from salt_jax.training.learning_rates import WarmupConstant, WarmupCosine
from salt_jax.training.optimizers import Adafactor, AdamW, Muon, Optimizer
from salt_jax.training.projection import ProjectionTrainer
from salt_jax.training.train_state import (
    StateLayout,
    TrainState,
    abstract_sharded_params,
    make_layout,
)
from salt_jax.training.train_step import BATCH_FEATURES, Programs, compile_programs, lower_step

STUDENT = DecoderConfig(embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64, vocab_size=259)
WIDE = dataclasses.replace(STUDENT, embed_dim=128, mlp_dim=256, num_layers=1)
TEACHER = dataclasses.replace(STUDENT, embed_dim=16, mlp_dim=32, num_heads=2, vocab_multiple=256)
ADAMW = AdamW(WarmupConstant(1e-2), epsilon=1e-3)
ADAFACTOR = Adafactor(WarmupConstant(1e-2))
MUON = Muon(WarmupConstant(1e-2), weight_decay=0.1, epsilon=1e-3)
LOSS = LossConfig(teacher_temperature=0.5, z_loss=1e-4)
STEPS = 3
LENGTH = 16  # of the rows of the cache fixture
SINGLE = partitioning.MeshConfig(fsdp=1)


@functools.cache
def compiled(
    mesh_config: partitioning.MeshConfig,
    devices: int,
    microbatches: int,
    with_teacher: bool,
    optimizer: Optimizer,
    student: DecoderConfig,
) -> tuple[StateLayout, Any, Programs]:
    """Layout, teacher and programs, compiled once for equal settings: compiling is what is slow."""
    mesh = mesh_config.make(jax.devices()[:devices])
    layout = make_layout(student, optimizer.make(STEPS, student), mesh)
    teacher = make_layout(TEACHER, optimizer.make(STEPS, TEACHER), mesh).create(7).params
    programs = compile_programs(
        layout,
        LOSS,
        (8, LENGTH),
        microbatches=microbatches,
        teacher_config=TEACHER if with_teacher else None,
        teacher_params=teacher,
    )
    return layout, teacher, programs


def train(
    cache: PackedCache,
    mesh: partitioning.MeshConfig,
    *,
    devices: int = 1,
    microbatches: int = 1,
    omega: float | None = 0.5,
    optimizer: Optimizer = ADAMW,
    student: DecoderConfig = STUDENT,
    spoil_step: int | None = None,
    steps: int = STEPS,
) -> tuple[Any, list[dict[str, float]]]:
    """A few steps; the final state and the metrics, on the host."""
    layout, teacher, programs = compiled(
        mesh, devices, microbatches, omega is not None, optimizer, student
    )
    split = cache.split("train")
    pipeline = InputPipeline(
        {"cache": split}, 8, cache.start_id, RowOrder(None, len(split), seed=0)
    )
    state, history = layout.create(0), []
    for step in range(steps):
        batch = pipeline.batch(step)
        if step == spoil_step:
            batch["loss_weights"] = batch["loss_weights"] * np.float32(np.nan)
        on_device = partitioning.to_device({n: batch[n] for n in BATCH_FEATURES}, layout.mesh)
        if programs.distill is None:
            state, metrics = programs.plain(state, on_device)
        else:
            state, metrics = programs.distill(state, on_device, teacher, np.float32(omega))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def assert_close(actual: TrainState, expected: TrainState, tolerance: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [
        (partitioning.MeshConfig(), ADAMW),
        (partitioning.MeshConfig(data=8, fsdp=1), ADAMW),
        (partitioning.MeshConfig(slice=2, data=2, fsdp=2), ADAMW),
        (partitioning.MeshConfig(slice=2, data=1, fsdp=2, tensor=2), ADAMW),
        (partitioning.MeshConfig(slice=2, data=1, fsdp=2, tensor=2), ADAFACTOR),
        (partitioning.MeshConfig(fsdp=4, tensor=2), MUON),
    ],
    ids=["fsdp", "data", "slice-data-fsdp", "slice-fsdp-tensor", "adafactor", "muon"],
)
def test_sharded_equals_single_device(
    cache: PackedCache, mesh: partitioning.MeshConfig, optimizer: Optimizer
) -> None:
    # Adafactor factors the moments of matrices of 128 × 128 and more.
    student = WIDE if optimizer is ADAFACTOR else STUDENT
    single, expected = train(cache, SINGLE, optimizer=optimizer, student=student)
    sharded, actual = train(cache, mesh, devices=8, optimizer=optimizer, student=student)
    assert_close(sharded.params, single.params)
    for a, b in zip(actual, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_parameters_and_slots_are_sharded() -> None:
    mesh = partitioning.MeshConfig(fsdp=4, tensor=2).make()
    layout = make_layout(STUDENT, ADAMW.make(1, STUDENT), mesh)
    state = layout.create(0)
    embedding = [p for p in jax.tree.leaves(state.params) if p.shape == (384, 32)]
    assert len(embedding) == 1
    assert embedding[0].addressable_shards[0].data.shape == (192, 8)
    slots = [s for s in jax.tree.leaves(state.opt_state) if s.shape == (384, 32)]
    assert [s.addressable_shards[0].data.shape for s in slots] == [(192, 8)] * 2


def test_every_slot_of_muon_lies_as_its_parameter() -> None:
    mesh = partitioning.MeshConfig(fsdp=4, tensor=2).make()
    layout = make_layout(STUDENT, MUON.make(1, STUDENT), mesh)
    parameters = {
        tuple(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(layout.abstract.params)
    }
    slots = jax.tree_util.tree_leaves_with_path(layout.abstract.opt_state)
    found = []
    for path, slot in slots:
        owner = next((tuple(path[i:]) for i in range(len(path)) if path[i:] in parameters), None)
        if owner is not None:
            assert slot.sharding == parameters[owner].sharding
            found.append(owner)
    # One moment for kernels, Adam's two for the rest.
    kernels = [path for path in parameters if path[-1].key == "kernel"]
    assert len(found) == 2 * len(parameters) - len(kernels)


@pytest.mark.parametrize("omega", [None, 0.5], ids=["plain", "distill"])
def test_accumulated_equals_whole_batch(cache: PackedCache, omega: float | None) -> None:
    whole, expected = train(cache, SINGLE, omega=omega)
    parts, actual = train(cache, SINGLE, omega=omega, microbatches=4)
    assert_close(parts.params, whole.params)
    for a, b in zip(actual, expected, strict=True):
        assert a["hard"] == pytest.approx(b["hard"], rel=1e-5)
        assert a["weight"] == b["weight"]


def test_slices_add_up_their_gradients_once_a_step(cache: PackedCache) -> None:
    """Gradients and metrics are those of one device; in bfloat16 only the gradients are rounded."""
    split = cache.split("train")
    batch = InputPipeline({"cache": split}, 8, 0, RowOrder(None, len(split), 0)).batch(0)
    batch["loss_weights"][:5, 4:] = 0.0  # the slices' tokens differ in number
    slices, results = partitioning.MeshConfig(slice=2, fsdp=2), []
    for mesh_config, devices, parts, dtype in (
        (SINGLE, 1, 1, None),
        (slices, 4, 2, None),
        (slices, 4, 2, "bfloat16"),
    ):
        mesh = mesh_config.make(jax.devices()[:devices])
        layout = make_layout(STUDENT, ADAMW.make(1, STUDENT), mesh)
        teacher = make_layout(TEACHER, ADAMW.make(1, TEACHER), mesh).create(7).params
        step = lower_step(
            *(layout, LOSS, (8, LENGTH), parts, TEACHER, teacher), slice_gradient_dtype=dtype
        ).compile()
        transfers = collectives(hlo.parse(step.as_text()), mesh.shape["slice"])
        times = {transfer.times for transfer in transfers if transfer.network_bytes}
        assert times == ({1} if devices > 1 else set())
        on_device = partitioning.to_device({n: batch[n] for n in BATCH_FEATURES}, mesh)
        state, metrics = step(layout.create(0), on_device, teacher, np.float32(0.5))
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        values = {name: float(value) for name, value in metrics.items()}
        results.append((jax.device_get(moments), values))
    (single, expected), (exact, metrics), (rounded, coarse) = results
    assert metrics == pytest.approx(expected, rel=1e-5)
    for a, b, c in zip(exact, single, rounded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(c, b, rtol=1e-2, atol=1e-2 * np.abs(b).max())
    assert coarse.pop("grad_norm") == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert coarse.pop("update_norm") == pytest.approx(expected["update_norm"], rel=1e-2)
    assert coarse == {name: metrics[name] for name in coarse}
    assert any((a != c).any() for a, c in zip(exact, rounded, strict=True))


def test_factored_slots_are_sharded() -> None:
    mesh = partitioning.MeshConfig(fsdp=4, tensor=2).make()
    layout = make_layout(WIDE, ADAFACTOR.make(1, WIDE), mesh)
    slots = jax.tree.leaves(layout.abstract.opt_state)
    sharded = {s.shape: s.sharding.shard_shape(s.shape) for s in slots if s.sharding.spec != ()}
    # The embedding [384, 128] is split into [192, 32]; its rows' and columns' moments likewise.
    assert sharded[(384,)] == (192,)
    assert sharded[(128,)] == (32,)


def test_omega_0_equals_plain(cache: PackedCache) -> None:
    plain, _ = train(cache, SINGLE, omega=None)
    distilled, _ = train(cache, SINGLE, omega=0.0)
    assert_close(distilled.params, plain.params)
    taught, _ = train(cache, SINGLE, omega=1.0)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), taught.params, plain.params)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_non_finite_update_is_skipped_and_counted(cache: PackedCache) -> None:
    state, history = train(cache, SINGLE, spoil_step=1)
    before, _ = train(cache, SINGLE, spoil_step=1, steps=1)
    after, _ = train(cache, SINGLE, spoil_step=1, steps=2)
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert [int(m["skipped_updates"]) for m in history] == [0, 1, 1]
    assert int(state.step) == STEPS
    assert int(state.skipped_updates) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.isfinite(history[2]["loss"])


def test_plain_program_has_no_trace_of_a_teacher(cache: PackedCache) -> None:
    mesh = partitioning.MeshConfig().make(jax.devices()[:1])
    layout = make_layout(STUDENT, ADAMW.make(1, STUDENT), mesh)
    teacher = make_layout(TEACHER, ADAMW.make(1, TEACHER), mesh).abstract.params
    shape = (8, cache.sequence_length)
    alone = compile_programs(layout, LOSS, shape).plain
    both = compile_programs(layout, LOSS, shape, teacher_config=TEACHER, teacher_params=teacher)
    assert both.plain.cost_analysis() == alone.cost_analysis()  # type: ignore[attr-defined]
    temporary = [p.memory_analysis().temp_size_in_bytes for p in (both.plain, alone)]  # type: ignore[attr-defined]
    assert temporary[0] == temporary[1]
    assert both.distill.cost_analysis()["flops"] > alone.cost_analysis()["flops"]  # type: ignore[union-attr, attr-defined]


@pytest.mark.parametrize("soft_term", [True, False], ids=["salt and let", "let"])
def test_let_is_its_formula(cache: PackedCache, soft_term: bool) -> None:
    """Loss and gradients are those of separate models and autodiff; microbatches and a mesh are as
    one batch on one device; with half of the rows untaught, too."""
    alignment, loss = Alignment(stop=10, layer=1), dataclasses.replace(LOSS, z_loss=0.0)
    split, extra = cache.split("train"), ("distill",)
    batch = InputPipeline({"cache": split}, 8, 0, RowOrder(None, len(split), 0)).batch(0)
    batch["loss_weights"][:3, 4:] = 0.0
    batch["distill"] = np.array([1, 0, 1, 0, 1, 1, 0, 0], np.float32)
    trainer = ProjectionTrainer(32, 16, ADAMW.learning_rate.schedule(1))
    results = []
    for slices, devices, microbatches in ((1, 1, 1), (2, 4, 2), (1, 8, 1)):
        mesh = partitioning.MeshConfig(slice=slices).make(jax.devices()[:devices])
        layout = make_layout(STUDENT, ADAMW.make(1, STUDENT), mesh, projection=trainer)
        teacher = make_layout(TEACHER, ADAMW.make(1, TEACHER), mesh).create(7).params
        of_step = (layout, loss, (8, LENGTH), microbatches, TEACHER, teacher, extra, 0)
        step = lower_step(*of_step, alignment, soft_term).compile()
        names = (*BATCH_FEATURES, *extra)
        on_device = partitioning.to_device({n: batch[n] for n in names}, mesh)
        weights = [np.float32(weight) for weight in (0.4, 0.3)]
        state, metrics = step(layout.create(0), on_device, teacher, *weights)
        results.append(jax.device_get((state, metrics)))
    for state, metrics in results[1:]:
        assert_close(state, results[0][0])
        assert metrics["grad_norm"] == pytest.approx(results[0][1]["grad_norm"], rel=1e-4)

    mesh = partitioning.MeshConfig().make(jax.devices()[:1])
    start = make_layout(STUDENT, ADAMW.make(1, STUDENT), mesh, projection=trainer).create(0)
    frozen = make_layout(TEACHER, ADAMW.make(1, TEACHER), mesh).create(7).params
    assert start.projection is not None
    kernel = start.projection.kernel
    one_block = dataclasses.replace(STUDENT, num_layers=1)

    def logits(config: DecoderConfig, params: Any) -> jax.Array:
        hidden = decoder.hidden_states(config, params, batch)
        return decoder.logits(hidden, decoder.head_kernel(params, config), config)[..., :259]

    def by_hand(params: Any, kernel: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(STUDENT, params))
        hard = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        q = jax.nn.softmax(logits(TEACHER, frozen) / 0.5)
        omega = 0.4 * batch["distill"][:, None] if soft_term else 0.0
        loss = (1 - omega) * hard - omega * jnp.sum(q * log_p, axis=-1)
        first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
        # RMSNorm with a scale of 1 changes no direction.
        h = decoder.hidden_states(one_block, first, batch) @ kernel
        t = decoder.hidden_states(TEACHER, frozen, batch)
        norms = jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(t, axis=-1)
        loss -= 0.3 * batch["distill"][:, None] * jnp.sum(h * t, axis=-1) / norms
        return jnp.sum(batch["loss_weights"] * loss) / batch["loss_weights"].sum()

    expected, gradients = jax.value_and_grad(by_hand, argnums=(0, 1))(start.params, kernel)
    state, metrics = results[0]
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradients[0])), rel=1e-4)
    # Adam's first step.
    step_DxE = gradients[1] / (np.abs(gradients[1]) + 1e-8)
    moved = np.asarray(state.projection.kernel) - np.asarray(kernel)
    np.testing.assert_allclose(moved, -1e-2 * step_DxE, rtol=1e-2, atol=1e-6)
    assert -1 < metrics["cosine"] < 1


def test_soft_caps_of_student_and_teacher(cache: PackedCache) -> None:
    """Loss and gradients are those of decoder.logits, by autodiff."""
    student, teacher = (
        dataclasses.replace(config, logits_soft_cap=cap)
        for config, cap in ((STUDENT, 0.3), (TEACHER, 0.2))
    )
    mesh = partitioning.MeshConfig().make(jax.devices()[:1])
    layout = make_layout(student, ADAMW.make(1, student), mesh)
    frozen = make_layout(teacher, ADAMW.make(1, teacher), mesh).create(7).params
    split, loss = cache.split("train"), dataclasses.replace(LOSS, z_loss=0.0)
    batch = InputPipeline({"cache": split}, 8, 0, RowOrder(None, len(split), 0)).batch(0)

    def log_p(config: DecoderConfig, params: Any, temperature: float) -> jax.Array:
        hidden = decoder.hidden_states(config, params, batch)
        logits = decoder.logits(hidden, decoder.head_kernel(params, config), config)[..., :259]
        assert config.logits_soft_cap is not None
        return jax.nn.log_softmax(logits / temperature)

    def by_hand(params: Any) -> jax.Array:
        log_p_BxLxV, q_BxLxV = log_p(student, params, 1.0), jnp.exp(log_p(teacher, frozen, 0.5))
        hard = -jnp.take_along_axis(log_p_BxLxV, batch["targets"][..., None], axis=-1)[..., 0]
        token = 0.6 * hard - 0.4 * jnp.sum(q_BxLxV * log_p_BxLxV, axis=-1)
        return jnp.sum(batch["loss_weights"] * token) / batch["loss_weights"].sum()

    expected, gradients = jax.value_and_grad(by_hand)(layout.create(0).params)
    programs = compile_programs(
        layout, loss, (8, LENGTH), teacher_config=teacher, teacher_params=frozen
    )
    assert programs.distill is not None
    on_device = partitioning.to_device({n: batch[n] for n in BATCH_FEATURES}, mesh)
    _, metrics = programs.distill(layout.create(0), on_device, frozen, np.float32(0.4))
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradients)), rel=1e-4)


def test_weights_are_divided_out_once(cache: PackedCache) -> None:
    """Microbatches with unequal weights must not each count the same."""
    mesh = partitioning.MeshConfig().make(jax.devices()[:1])
    layout = make_layout(STUDENT, AdamW(WarmupCosine(1.0), clip_norm=0).make(1, STUDENT), mesh)
    split = cache.split("train")
    batch = InputPipeline({"cache": split}, 8, 0, RowOrder(None, len(split), 0)).batch(0)
    batch["loss_weights"][::2, 4:] = 0.0
    norms = []
    for microbatches in (1, 2, 8):
        program = compile_programs(
            layout, LOSS, (8, cache.sequence_length), microbatches=microbatches
        ).plain
        on_device = partitioning.to_device({n: batch[n] for n in BATCH_FEATURES}, mesh)
        _, metrics = program(layout.create(0), on_device)
        assert metrics["weight"] == batch["loss_weights"].sum()
        norms.append(float(metrics["grad_norm"]))
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert jnp.isfinite(norms[0])


def test_a_batch_says_which_rows_are_taught(cache: PackedCache) -> None:
    """Untaught rows are trained on plainly, and no metric of the teacher counts them."""
    mesh = partitioning.MeshConfig(fsdp=2).make(jax.devices()[:2])
    layout = make_layout(STUDENT, ADAMW.make(1, STUDENT), mesh)
    teacher = make_layout(TEACHER, ADAMW.make(1, TEACHER), mesh).create(7).params
    split = cache.split("train")
    batch = InputPipeline({"cache": split}, 8, 0, RowOrder(None, len(split), 0)).batch(0)
    batch["loss_weights"][:3, 4:] = 0.0

    @functools.cache
    def program(extra: tuple[str, ...], microbatches: int) -> Any:
        models = (TEACHER, teacher)
        return lower_step(layout, LOSS, (8, LENGTH), microbatches, *models, extra).compile()

    def run(extra: tuple[str, ...], omega: float, shares: Any, microbatches: int = 1) -> Any:
        batch["distill"] = np.array(shares, np.float32)
        names = (*BATCH_FEATURES, *extra)
        on_device = partitioning.to_device({n: batch[n] for n in names}, mesh)
        arguments = (on_device, teacher, np.float32(omega))
        state, metrics = program(extra, microbatches)(layout.create(0), *arguments)
        return jax.device_get(state), {name: float(value) for name, value in metrics.items()}

    ones, today = run(("distill",), 0.5, [1] * 8), run((), 0.5, [1] * 8)
    assert_close(ones[0].params, today[0].params)
    assert ones[1].pop("distilled") == 1
    assert ones[1] == pytest.approx(today[1], rel=1e-5)

    none, plain = run(("distill",), 0.5, [0] * 8), run((), 0.0, [0] * 8)
    assert_close(none[0].params, plain[0].params)
    assert (none[1]["distilled"], none[1]["soft"]) == (0, 0)

    some_rows = [1, 0, 0, 1, 0, 0, 0, 1]
    some, parted = (run(("distill",), 0.5, some_rows, parts)[1] for parts in (1, 2))
    assert parted == pytest.approx(some, rel=1e-4)
    taught_B = np.array(some_rows, bool)
    assert some["distilled"] == pytest.approx(
        batch["loss_weights"][taught_B].sum() / batch["loss_weights"].sum()
    )
    batch["loss_weights"][~taught_B] = 0.0
    alone = run((), 0.5, some_rows)[1]
    for name in ("soft", "teacher_hard", "agreement"):
        assert some[name] == pytest.approx(alone[name], rel=1e-5)


@functools.cache
def distilling_hlo(fsdp: int) -> hlo.Module:
    """The distilling step over 8 × 64 tokens of a vocabulary of 4,096, in chunks of 16 a device."""
    mesh = partitioning.MeshConfig(fsdp=fsdp).make(jax.devices()[:fsdp])
    student = dataclasses.replace(STUDENT, num_layers=1, vocab_size=4096)
    teacher = dataclasses.replace(TEACHER, num_layers=1, vocab_size=4096)
    lowered = lower_step(
        make_layout(student, ADAMW.make(STEPS, student), mesh),
        dataclasses.replace(LOSS, chunk_tokens=16),
        (8, 64),
        1,
        teacher,
        abstract_sharded_params(teacher, mesh, partitioning.DEFAULT_RULES),
    )
    return hlo.parse(lowered.compile().as_text())


@pytest.mark.parametrize("fsdp", [1, 8])
def test_no_logits_of_all_tokens_exist(fsdp: int) -> None:
    module, tokens = distilling_hlo(fsdp), 8 * 64 // fsdp
    arrays = {s.dims for e in hlo.executions(module) for s in e.instruction.shapes}
    assert (16, 4096) in arrays  # a chunk's
    largest = max(math.prod(dims) for dims in arrays)
    assert largest < tokens * 4096


def test_the_head_is_gathered_once_and_its_gradient_scattered_once() -> None:
    module = distilling_hlo(8)
    whole = [e for e in hlo.select(module, opcode="all-gather") if is_head(e, 32)]
    assert [e.times for e in whole] == [1.0] * len(whole)
    assert len(whole) in (1, 2)  # the embedding's look-up may have its own
    assert not [e for e in whole if e.depth]
    scattered = hlo.select(module, opcode="reduce-scatter", dims=(512, 32))
    assert [e.times for e in scattered] == [1.0]
    assert not hlo.select(module, opcode="all-reduce", dims=(4096, 32))
    teachers = [e for e in hlo.select(module, opcode="all-gather") if is_head(e, 16)]
    assert teachers
    assert not [e for e in teachers if e.depth]


def is_head(execution: hlo.Execution, width: int) -> bool:
    return any(sorted(s.dims) == [width, 4096] for s in execution.instruction.shapes)
