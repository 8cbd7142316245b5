"""The chunked loss against whole logits in float64: values, gradients, shapes, meshes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from salt_jax.distill.chunked_loss import loss_sums, target_ranks
from salt_jax.distill.divergences import JensenShannon, ReverseKL
from salt_jax.distill.gates import Confidence, TeacherAhead, TruthInTop
from salt_jax.distill.head_sharding import HeadSharding
from salt_jax.distill.losses import TEACHER_VALUES, LossConfig
from salt_jax.distill.token_losses import token_losses
from salt_jax.errors import InputError
from salt_jax.training.partitioning import MeshConfig

VOCAB = 11
CONFIGS = [
    LossConfig(),
    LossConfig(teacher_temperature=1.0, z_loss=1e-2),
    LossConfig(teacher_temperature=2.0, student_temperature=2.0, scale_by_temperature_squared=True),
    LossConfig(teacher_top_k=1),
    LossConfig(teacher_temperature=1.0, teacher_top_k=4, student_temperature=0.7),
    LossConfig(teacher_top_k=VOCAB),
    LossConfig(teacher_temperature=1.0, divergence=ReverseKL()),
    LossConfig(divergence=ReverseKL(), student_temperature=0.5, teacher_top_k=3),
    LossConfig(teacher_temperature=1.0, divergence=JensenShannon()),
    LossConfig(divergence=JensenShannon(0.1), teacher_top_k=3),
    LossConfig(gate=TeacherAhead()),
    LossConfig(teacher_temperature=1.0, gate=TruthInTop(3), teacher_top_k=4),
    LossConfig(gate=Confidence(0.5), divergence=JensenShannon()),
]
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
# Slice, data, fsdp and tensor axes, and the axes that split D of the head.
MESHES = [
    ((1, 1, 8, 1), ("fsdp",)),
    ((2, 2, 2, 1), ("fsdp",)),
    ((1, 2, 2, 2), ("fsdp",)),
    ((1, 1, 1, 8), ("fsdp",)),
    ((1, 2, 1, 4), ()),
]


def case(
    batch: int = 8,
    length: int = 5,
    width: int = 16,
    padding: tuple[int, int] = (5, 13),
    seed: int = 0,
    scale: float = 1.0,
    with_teacher: bool = True,
    lacks: int = 0,
) -> dict[str, Any]:
    """Arguments of loss_sums but for the config; student and teacher padded to their own sizes, the
    teacher's ids fewer by what it `lacks`."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape) * scale  # noqa: E731
    weights = rng.choice([0.0, 0.5, 1.0], size=(batch, length), p=[0.3, 0.2, 0.5])
    arguments: dict[str, Any] = {
        "student_hidden_BxLxD": normal(batch, length, width),
        "student_head_VxD": normal(VOCAB + padding[0], width) / np.sqrt(width),
        "targets_BxL": rng.integers(VOCAB - lacks, size=(batch, length)).astype(np.int32),
        "weights_BxL": weights,
        "omega": 0.4,
    }
    if with_teacher:
        arguments["teacher_hidden_BxLxD"] = normal(batch, length, width // 2)
        ids = VOCAB - lacks + padding[1]
        arguments["teacher_head_VxD"] = normal(ids, width // 2) / np.sqrt(width / 2)
    return arguments


def to_dtype(arguments: dict[str, Any], dtype: Any) -> dict[str, Any]:
    keep = ("targets_BxL",)
    return {
        name: jnp.asarray(value) if name in keep else jnp.asarray(value, dtype)
        for name, value in arguments.items()
    }


def whole_sums(
    config: LossConfig,
    teacher_vocab_size: int | None = None,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    **arguments: Any,
) -> Any:
    """The reference: whole logits, and autodiff through them."""
    weights_BxL, distill_B = arguments["weights_BxL"], arguments.get("distill_B")
    counts_BxL = weights_BxL > 0

    def logits(model: str, cap: float | None) -> jax.Array | None:
        if f"{model}_hidden_BxLxD" not in arguments:
            return None
        hidden_BxLxD = jnp.where(counts_BxL[..., None], arguments[f"{model}_hidden_BxLxD"], 0)
        z_BxLxV = hidden_BxLxD @ arguments[f"{model}_head_VxD"].T
        return z_BxLxV if cap is None else cap * jnp.tanh(z_BxLxV / cap)

    targets_BxL = jnp.where(counts_BxL, arguments["targets_BxL"], 0)
    student, teacher = logits("student", soft_cap), logits("teacher", teacher_soft_cap)
    assert student is not None
    omega = arguments["omega"] if distill_B is None else arguments["omega"] * distill_B[:, None]
    tokens = token_losses(
        student,
        teacher,
        targets_BxL,
        omega,
        config,
        VOCAB,
        teacher_vocab_size=teacher_vocab_size,
    )
    if distill_B is not None:
        taught = tokens.keys() & {*TEACHER_VALUES}
        tokens |= {name: distill_B[:, None] * tokens[name] for name in taught}
        tokens["distilled"] = jnp.broadcast_to(distill_B[:, None], targets_BxL.shape)
    sums = {name: jnp.sum(weights_BxL * value) for name, value in tokens.items()}
    return sums.pop("loss"), jnp.sum(weights_BxL), sums


def with_gradients(sums: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """((sums of the loss and the weights, metrics), gradients by hidden states and head)."""

    @jax.jit
    def run(hidden_BxLxD: jax.Array, head_VxD: jax.Array, rest: dict[str, Any]) -> Any:
        def total(hidden_BxLxD: jax.Array, head_VxD: jax.Array) -> Any:
            result = sums(student_hidden_BxLxD=hidden_BxLxD, student_head_VxD=head_VxD, **rest)
            return 3.0 * result[0], result  # a cotangent that isn't 1

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden_BxLxD, head_VxD)

    rest = {name: value for name, value in arguments.items() if not name.startswith("student")}
    (_, result), gradients = run(
        arguments["student_hidden_BxLxD"], arguments["student_head_VxD"], rest
    )
    return jax.tree.map(np.asarray, (result, gradients))


def chunked(config: LossConfig, chunk_tokens: int, **more: Any) -> Callable[..., Any]:
    config = dataclasses.replace(config, chunk_tokens=chunk_tokens)
    return functools.partial(loss_sums, config=config, vocab_size=VOCAB, **more)


def assert_equal_in_float64(
    config: LossConfig, chunk_tokens: int, arguments: Any, **more: Any
) -> None:
    with jax.enable_x64(True):
        arguments = to_dtype(arguments, jnp.float64)
        want = with_gradients(functools.partial(whole_sums, config, **more), arguments)
        got = with_gradients(chunked(config, chunk_tokens, **more), arguments)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


@EACH_CONFIG
def test_equals_whole_logits_in_float64(config: LossConfig) -> None:
    assert_equal_in_float64(config, 7, case())
    assert_equal_in_float64(config, 1000, case(with_teacher=False))


@pytest.mark.parametrize(
    "config", [CONFIGS[1], CONFIGS[4], CONFIGS[11]], ids=("kl", "top4", "gate")
)
def test_soft_caps_of_both_models(config: LossConfig) -> None:
    assert_equal_in_float64(config, 7, case(scale=2.0), soft_cap=1.5, teacher_soft_cap=0.7)


def test_soft_caps_over_a_mesh() -> None:
    caps = {"soft_cap": 1.5, "teacher_soft_cap": 0.7}
    assert_equal_on_a_mesh(CONFIGS[1], (1, 2, 2, 2), ("fsdp",), case(scale=2.0), **caps)


@pytest.mark.parametrize("block_bytes", [64, 300, 1000])
def test_the_head_gradient_in_blocks_of_ids(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """11 ids of 16 numbers in float64, in blocks of 1, 3 and 6 with a smaller one at the end."""
    monkeypatch.setattr("salt_jax.distill.chunked_loss._HEAD_GRADIENT_BLOCK_BYTES", block_bytes)
    assert_equal_in_float64(LossConfig(), 7, case(padding=(0, 13)))


@settings(max_examples=25, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    width=st.integers(2, 6),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    chunk_tokens=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    with_teacher=st.booleans(),
)
def test_equals_whole_logits_at_any_shape(
    config: LossConfig,
    batch: int,
    length: int,
    width: int,
    padding: tuple[int, int],
    chunk_tokens: int,
    seed: int,
    scale: float,
    with_teacher: bool,
) -> None:
    arguments = case(batch, length, width, padding, seed, scale, with_teacher)
    assert_equal_in_float64(config, chunk_tokens, arguments)


def test_gradients_equal_finite_differences() -> None:
    config = LossConfig(teacher_temperature=0.5, z_loss=1e-2)
    with jax.enable_x64(True):
        arguments = to_dtype(case(batch=2, length=3, width=4), jnp.float64)
        sums = chunked(config, 4)
        _, (d_hidden, d_head) = with_gradients(sums, arguments)

        @jax.jit
        def loss(name_hidden: jax.Array, name_head: jax.Array) -> jax.Array:
            given = {"student_hidden_BxLxD": name_hidden, "student_head_VxD": name_head}
            return 3.0 * sums(**{**arguments, **given})[0]

        hidden, head = arguments["student_hidden_BxLxD"], arguments["student_head_VxD"]
        step = 1e-6
        for i in np.ndindex(hidden.shape):
            rise = loss(hidden.at[i].add(step), head) - loss(hidden.at[i].add(-step), head)
            np.testing.assert_allclose(rise / (2 * step), d_hidden[i], rtol=1e-6, atol=1e-7)
        for i in np.ndindex(head.shape):
            rise = loss(hidden, head.at[i].add(step)) - loss(hidden, head.at[i].add(-step))
            np.testing.assert_allclose(rise / (2 * step), d_head[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("sizes", "embed"), MESHES, ids=str)
@pytest.mark.parametrize(
    "config",
    [CONFIGS[1], CONFIGS[4], CONFIGS[9], CONFIGS[11]],
    ids=("kl", "top4", "jsd", "gate"),
)
def test_equal_on_one_device_and_on_eight(
    config: LossConfig, sizes: tuple[int, ...], embed: tuple[str, ...]
) -> None:
    assert_equal_on_a_mesh(config, sizes, embed, case())


@pytest.mark.parametrize(
    ("padding", "width"), [((7, 5), 16), ((5, 13), 12)], ids=("vocabulary", "width")
)
def test_equal_where_the_mesh_does_not_divide_the_head(
    padding: tuple[int, int], width: int
) -> None:
    arguments = case(padding=padding, width=width)
    assert_equal_on_a_mesh(CONFIGS[1], (1, 1, 8, 1), ("fsdp",), arguments)
    assert_equal_on_a_mesh(CONFIGS[1], (1, 1, 4, 2), ("fsdp",), arguments)


def assert_equal_on_a_mesh(
    config: LossConfig,
    sizes: tuple[int, ...],
    embed: tuple[str, ...],
    arguments: Any,
    **more: Any,
) -> None:
    with jax.enable_x64(True):
        arguments = to_dtype(arguments, jnp.float64)
        want = with_gradients(chunked(config, 7, **more), arguments)
        with jax.set_mesh(MeshConfig(*sizes).make()) as _:
            sharding = HeadSharding(
                MeshConfig(*sizes).make(), ("slice", "data", "fsdp"), ("tensor",), embed
            )
            got = with_gradients(chunked(config, 2, sharding=sharding, **more), arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, want)


def test_the_cosine_of_the_two_gradients() -> None:
    config = LossConfig(teacher_temperature=1.0, gradient_cosine=True)
    assert_equal_in_float64(config, 7, case())
    assert_equal_on_a_mesh(config, (1, 2, 2, 2), ("fsdp",), case())


SHARES_B = np.array([1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.25])
SOME_CONFIGS = pytest.mark.parametrize(
    "config",
    [CONFIGS[1], CONFIGS[2], CONFIGS[7], CONFIGS[8], CONFIGS[10]],
    ids=("kl", "squared", "rkl", "jsd", "gate"),
)


@SOME_CONFIGS
def test_rows_with_an_omega_of_their_own(config: LossConfig) -> None:
    assert_equal_in_float64(config, 7, {**case(), "distill_B": SHARES_B})


def test_rows_with_an_omega_of_their_own_over_a_mesh() -> None:
    arguments = {**case(), "distill_B": SHARES_B}
    assert_equal_on_a_mesh(CONFIGS[1], (1, 2, 2, 2), ("fsdp",), arguments)


LACKS = 4  # ids of the student's that the teacher hasn't
WITHOUT_REVERSE_KL = [
    config
    for config in CONFIGS
    if not isinstance(config.divergence, ReverseKL) and config.teacher_top_k <= VOCAB - LACKS
]


@pytest.mark.parametrize("config", WITHOUT_REVERSE_KL, ids=range(len(WITHOUT_REVERSE_KL)))
def test_a_teacher_that_lacks_ids(config: LossConfig) -> None:
    for padding in ((5, 0), (0, LACKS), (3, 13)):
        arguments = {**case(padding=padding, lacks=LACKS), "distill_B": SHARES_B}
        assert_equal_in_float64(config, 7, arguments, teacher_vocab_size=VOCAB - LACKS)


def test_a_teacher_that_lacks_ids_over_a_mesh() -> None:
    arguments = case(lacks=LACKS)
    assert_equal_on_a_mesh(
        CONFIGS[4], (1, 1, 4, 2), ("fsdp",), arguments, teacher_vocab_size=VOCAB - LACKS
    )


@SOME_CONFIGS
def test_where_the_teacher_has_no_part_its_states_may_be_anything(config: LossConfig) -> None:
    clean = to_dtype({**case(), "distill_B": SHARES_B}, jnp.float32)
    untaught_Bx1x1 = (SHARES_B == 0)[:, None, None]
    states_BxLxD = jnp.where(untaught_Bx1x1, jnp.nan, clean["teacher_hidden_BxLxD"])
    sums = chunked(config, 7)
    jax.tree.map(
        np.testing.assert_array_equal,
        with_gradients(sums, clean),
        with_gradients(sums, {**clean, "teacher_hidden_BxLxD": states_BxLxD}),
    )


@SOME_CONFIGS
def test_all_of_omega_in_every_row_is_omega(config: LossConfig) -> None:
    arguments = to_dtype(case(), jnp.float32)
    want, want_gradients = with_gradients(chunked(config, 7), arguments)
    got, gradients = with_gradients(
        chunked(config, 7), {**arguments, "distill_B": jnp.ones(8, jnp.float32)}
    )
    assert got[2].pop("distilled") == want[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        (got, gradients),
        (want, want_gradients),
    )


def test_products_of_bfloat16_are_added_in_float32() -> None:
    arguments = to_dtype(case(batch=8, length=64), jnp.bfloat16)
    arguments["weights_BxL"] = arguments["weights_BxL"].astype(jnp.float32)
    arguments["student_head_VxD"] = arguments["student_head_VxD"].astype(jnp.float32)
    (loss, _, metrics), (d_hidden, d_head) = with_gradients(chunked(CONFIGS[0], 3), arguments)
    assert {loss.dtype, *(x.dtype for x in metrics.values())} == {np.dtype(np.float32)}
    assert d_hidden.dtype == jnp.bfloat16
    assert d_head.dtype == np.float32
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
    rounded["student_head_VxD"] = np.asarray(
        arguments["student_head_VxD"].astype(jnp.bfloat16), np.float64
    )
    rounded["targets_BxL"] = arguments["targets_BxL"]
    with jax.enable_x64(True):
        want = with_gradients(
            functools.partial(whole_sums, CONFIGS[0]), to_dtype(rounded, jnp.float64)
        )
    np.testing.assert_allclose(loss, want[0][0], rtol=1e-5)
    # 171 chunks of bfloat16 gradients: added up in bfloat16 they would be off by percents.
    error = np.linalg.norm(d_head - want[1][1]) / np.linalg.norm(want[1][1])
    assert error < 2e-3


@EACH_CONFIG
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_gradients_are_finite_and_zero_on_padding(config: LossConfig, scale: float) -> None:
    arguments = to_dtype(case(scale=scale), jnp.float32)
    _, (d_hidden, d_head) = with_gradients(chunked(config, 7), arguments)
    assert np.isfinite(d_hidden).all()
    assert np.isfinite(d_head).all()
    assert (d_head[VOCAB:] == 0).all()
    assert (d_head[:VOCAB] != 0).any()


@EACH_CONFIG
def test_nothing_at_weight_zero_reaches_sums_or_gradients(config: LossConfig) -> None:
    clean = to_dtype(case(), jnp.float32)
    dropped = clean["weights_BxL"] == 0
    poison = {
        **clean,
        "teacher_hidden_BxLxD": jnp.where(
            dropped[..., None], jnp.nan, clean["teacher_hidden_BxLxD"]
        ),
        "student_hidden_BxLxD": jnp.where(
            dropped[..., None], jnp.inf, clean["student_hidden_BxLxD"]
        ),
        "targets_BxL": jnp.where(dropped, -1, clean["targets_BxL"]),
    }
    sums = chunked(config, 7)
    jax.tree.map(
        np.testing.assert_array_equal, with_gradients(sums, clean), with_gradients(sums, poison)
    )


def test_nothing_but_the_student_gets_a_gradient() -> None:
    arguments = to_dtype(case(), jnp.float32)
    names = ("teacher_hidden_BxLxD", "teacher_head_VxD", "omega", "weights_BxL")

    def total(*values: jax.Array) -> jax.Array:
        return chunked(CONFIGS[0], 7)(**{**arguments, **dict(zip(names, values, strict=True))})[0]

    def metric_sum(hidden: jax.Array) -> jax.Array:
        metrics = chunked(CONFIGS[0], 7)(**{**arguments, "student_hidden_BxLxD": hidden})[2]
        return sum(metrics.values(), jnp.float32(0.0))

    for gradient in jax.grad(total, argnums=(0, 1, 2, 3))(*(arguments[name] for name in names)):
        assert not gradient.any()
    assert not jax.grad(metric_sum)(arguments["student_hidden_BxLxD"]).any()


def test_omega_is_traced() -> None:
    """One program for every ω."""
    arguments, traces = to_dtype(case(), jnp.float32), []

    @jax.jit
    def total(omega: jax.Array) -> jax.Array:
        traces.append(omega)
        return chunked(CONFIGS[0], 7)(**{**arguments, "omega": omega})[0]

    assert len({float(total(omega)) for omega in (0.0, 0.5, 1.0)}) == 3
    assert len(traces) == 1


def head_sharding(mesh: Mesh) -> HeadSharding:
    return HeadSharding(mesh, ("slice", "data", "fsdp"), ("tensor",), ("fsdp",))


@pytest.mark.parametrize("sizes", [None, (1, 2, 2, 2)], ids=("one device", "eight"))
def test_target_ranks_equal_numpy(sizes: tuple[int, ...] | None) -> None:
    arguments = to_dtype(case(), jnp.float32)
    names = ("student_hidden_BxLxD", "student_head_VxD", "targets_BxL", "weights_BxL")
    hidden, head, targets, weights = (arguments[name] for name in names)
    sharding = head_sharding(MeshConfig(*sizes).make()) if sizes is not None else None
    ranks = jax.jit(lambda *x: target_ranks(*x, VOCAB, chunk_tokens=3, sharding=sharding))
    loss, greater = ranks(hidden, head, targets, weights)
    assert (loss.dtype, greater.dtype) == (np.float32, np.int32)
    logits = (np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T)[..., :VOCAB]
    truth = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)
    want = np.log(np.exp(logits).sum(-1)) - truth[..., 0]
    counts = np.asarray(weights) > 0
    np.testing.assert_allclose(np.asarray(loss)[counts], want[counts], rtol=1e-5, atol=1e-6)
    assert ((logits > truth).sum(-1) == np.asarray(greater))[counts].all()
    assert greater[counts].max() > 3


def test_a_vocabulary_that_cannot_be_split_is_named() -> None:
    arguments = to_dtype(case(padding=(4, 4)), jnp.float32)
    sharding = head_sharding(MeshConfig(1, 1, 4, 2).make())
    with pytest.raises(ValueError, match=r"vocab_multiple to a multiple of the mesh's tensor axis"):
        chunked(CONFIGS[0], 7, sharding=sharding)(**arguments)


def test_half_a_teacher_is_refused() -> None:
    arguments = to_dtype(case(), jnp.float32)
    del arguments["teacher_head_VxD"]
    with pytest.raises(ValueError, match="give both or neither"):
        chunked(CONFIGS[0], 7)(**arguments)


def test_top_k_above_the_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match="teacher_top_k is 12, more than the vocabulary's 11"):
        chunked(LossConfig(teacher_top_k=12), 7)(**to_dtype(case(), jnp.float32))
