"""Losses against float64 NumPy, and what their gradients are made of."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill.divergences import ForwardKL, JensenShannon, ReverseKL
from salt_jax.distill.gates import Confidence, TeacherAhead, TruthInTop
from salt_jax.distill.losses import LossConfig
from salt_jax.distill.token_losses import token_losses
from salt_jax.errors import InputError

BATCH, LENGTH, VOCAB = 2, 3, 11
CONFIGS = [
    LossConfig(),
    LossConfig(teacher_temperature=1.0, z_loss=1e-2),
    LossConfig(teacher_temperature=2.0, student_temperature=2.0, scale_by_temperature_squared=True),
    LossConfig(teacher_top_k=1),
    LossConfig(teacher_temperature=1.0, teacher_top_k=4),
    LossConfig(teacher_top_k=VOCAB),
    LossConfig(teacher_temperature=1.0, divergence=ReverseKL()),
    LossConfig(divergence=ReverseKL(), student_temperature=0.5, teacher_top_k=3),
    LossConfig(teacher_temperature=1.0, divergence=JensenShannon()),
    LossConfig(divergence=JensenShannon(0.1), teacher_top_k=3),
    LossConfig(gate=TeacherAhead()),
    LossConfig(teacher_temperature=1.0, gate=TruthInTop(4), teacher_top_k=2),
    LossConfig(gate=Confidence(0.5), divergence=JensenShannon()),
]
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def log_sum(log_x: np.ndarray) -> float:
    if not log_x.size:
        return -np.inf
    return float(np.log(np.exp(log_x - log_x.max()).sum()) + log_x.max())


def expect(weights: np.ndarray, values: np.ndarray) -> float:
    """Σ weights · values, where 0 · -inf is 0."""
    return float(sum(w * v for w, v in zip(weights, values, strict=True) if w > 0))


def oracle_token(
    z_s: np.ndarray, z_t: np.ndarray, y: int, omega: float, config: LossConfig
) -> dict[str, float]:
    """METHOD.md's formulas for one token, in float64, over real ids only."""
    z_s, z_t = z_s.astype(np.float64), z_t.astype(np.float64)
    log_p = log_softmax(z_s / config.student_temperature)
    log_q = log_softmax(z_t / config.teacher_temperature)
    if config.teacher_top_k:
        order = np.argsort(-z_t, kind="stable")
        top, rest = order[: config.teacher_top_k], order[config.teacher_top_k :]
        log_p, log_q = (np.append(x[top], log_sum(x[rest])) for x in (log_p, log_q))
    p, q = np.exp(log_p), np.exp(log_q)
    if isinstance(config.divergence, ForwardKL):
        soft = -expect(q, log_p)
    elif isinstance(config.divergence, ReverseKL):
        soft = expect(p, np.where(p > 0, log_p - log_q, 0.0))
    else:
        assert isinstance(config.divergence, JensenShannon)
        beta = config.divergence.beta
        log_m = np.log(beta * q + (1 - beta) * p)
        soft = beta * expect(q, log_q - log_m) + (1 - beta) * expect(p, log_p - log_m)
    if config.scale_by_temperature_squared:
        soft *= config.teacher_temperature**2
    hard, teacher_hard = -log_softmax(z_s)[y], -log_softmax(z_t)[y]
    gate: dict[str, float] = {}
    if isinstance(config.gate, TeacherAhead):
        gate = {"gate": float(teacher_hard < hard)}
    elif isinstance(config.gate, TruthInTop):
        gate = {"gate": float((z_t > z_t[y]).sum() < config.gate.k)}
    elif isinstance(config.gate, Confidence):
        gate = {"gate": np.exp(log_softmax(z_t)[y]) ** config.gate.gamma}
    omega *= gate.get("gate", 1.0)
    loss = (1 - omega) * hard + omega * soft + config.z_loss * log_sum(z_s) ** 2
    return {
        "loss": loss,
        "hard": hard,
        "soft": soft,
        "correct": float(z_s[y] >= z_s.max()),
        "teacher_hard": teacher_hard,
        "agreement": float(((z_s >= z_s.max()) & (z_t >= z_t.max())).any()),
        **gate,
    }


def oracle(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, omega: float, config: LossConfig
) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        tokens = [
            oracle_token(student[i][:VOCAB], teacher[i][:VOCAB], targets[i], omega, config)
            for i in np.ndindex(targets.shape)
        ]
    return {name: np.reshape([t[name] for t in tokens], targets.shape) for name in tokens[0]}


def random_case(
    seed: int, scale: float, student_ids: int = VOCAB, teacher_ids: int = VOCAB
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    student = scale * rng.normal(size=(BATCH, LENGTH, student_ids))
    teacher = scale * rng.normal(size=(BATCH, LENGTH, teacher_ids))
    targets = rng.integers(VOCAB, size=(BATCH, LENGTH))
    return student.astype(np.float32), teacher.astype(np.float32), targets.astype(np.int32)


@EACH_CONFIG
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4]),
    padding=st.sampled_from([(0, 0), (5, 0), (0, 5), (2, 7)]),
    omega=st.sampled_from([0.0, 0.3, 2 / 3, 1.0]),
    lacks=st.sampled_from([0, 0, 1, 3]),
)
def test_equals_float64_numpy(
    config: LossConfig,
    seed: int,
    scale: float,
    padding: tuple[int, int],
    omega: float,
    lacks: int,
) -> None:
    teachers = VOCAB - lacks
    if lacks and (isinstance(config.divergence, ReverseKL) or config.teacher_top_k > teachers):
        return  # refused, see below
    student, teacher, targets = random_case(seed, scale, VOCAB + padding[0], teachers + padding[1])
    targets = np.minimum(targets, teachers - 1)
    # What stands in the padding must not matter, be it larger than every logit or no number.
    student[..., VOCAB:], teacher[..., teachers:] = 1e9, np.nan
    arrays = map(jnp.asarray, (student, teacher, targets))
    got = token_losses(*arrays, omega, config, VOCAB, teacher_vocab_size=teachers)
    missing = np.full((*targets.shape, lacks), -np.inf, np.float32)
    teacher = np.concatenate([teacher[..., :teachers], missing], axis=-1)
    want = oracle(student, teacher, targets, omega, config)
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == jnp.float32
        # A float32 logit divided by τ has lost 6e-8 of its size before anything is summed, and so
        # has the p that weighs a difference of that size.
        atol = 1e-5 + 1e-6 * scale + 1e-7 * scale**2
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=atol)


@EACH_CONFIG
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_are_finite_and_zero_on_padding(config: LossConfig, scale: float) -> None:
    student, teacher, targets = random_case(1, scale, VOCAB + 5, VOCAB + 3)
    student[..., VOCAB:] = 1e9

    def total(student: jax.Array) -> jax.Array:
        losses = token_losses(student, jnp.asarray(teacher), targets, 0.5, config, VOCAB)
        return jnp.sum(losses["loss"])

    gradient = np.asarray(jax.grad(total)(jnp.asarray(student)))
    assert np.isfinite(gradient).all()
    assert (gradient[..., VOCAB:] == 0).all()
    assert (gradient[..., :VOCAB] != 0).any()


@EACH_CONFIG
def test_gradients_equal_finite_differences_in_float64(config: LossConfig) -> None:
    student, teacher, targets = random_case(2, 1.0)
    with jax.enable_x64(True):
        student64, teacher64 = jnp.asarray(student, jnp.float64), jnp.asarray(teacher, jnp.float64)

        def total(student: jax.Array) -> jax.Array:
            losses = token_losses(student, teacher64, jnp.asarray(targets), 0.7, config, VOCAB)
            return jnp.sum(losses["loss"])

        direction = jnp.asarray(np.random.default_rng(3).normal(size=student.shape))
        slope = jnp.sum(jax.grad(total)(student64) * direction)
        step = 1e-6 * direction
        difference = (total(student64 + step) - total(student64 - step)) / 2e-6
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)


def test_gradient_is_p_minus_blended_target() -> None:
    student, teacher, targets = random_case(4, 3.0)
    omega = 2 / 3

    def total(student: jax.Array) -> jax.Array:
        losses = token_losses(student, jnp.asarray(teacher), targets, omega, LossConfig(), VOCAB)
        return jnp.sum(losses["loss"])

    p, q = np.exp(log_softmax(student)), np.exp(log_softmax(teacher / 0.25))
    r = (1 - omega) * np.eye(VOCAB)[targets] + omega * q
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(student)), p - r, atol=1e-6)


def test_without_teacher_it_is_cross_entropy_whatever_omega() -> None:
    student, teacher, targets = random_case(5, 1.0)
    config = LossConfig(z_loss=1e-3)
    plain = token_losses(jnp.asarray(student), None, targets, 0.9, config, VOCAB)
    assert set(plain) == {"loss", "hard", "correct"}
    distilled = token_losses(
        jnp.asarray(student), jnp.asarray(teacher), targets, 0.0, config, VOCAB
    )
    for name, value in plain.items():
        np.testing.assert_array_equal(value, distilled[name])


def test_self_distillation_has_known_values() -> None:
    """A student equal to its teacher: no divergence, agreement everywhere, forward = entropy."""
    student, _, targets = random_case(6, 2.0)
    config = LossConfig(teacher_temperature=1.0)
    p = np.exp(log_softmax(student))
    entropy = -(p * np.log(p)).sum(-1)
    for divergence, soft in ((ForwardKL(), entropy), (ReverseKL(), 0), (JensenShannon(), 0)):
        one = dataclasses.replace(config, divergence=divergence)
        same = jnp.asarray(student)
        token = token_losses(same, same, targets, 1.0, one, VOCAB)
        np.testing.assert_allclose(token["soft"], np.broadcast_to(soft, targets.shape), atol=1e-5)
        np.testing.assert_array_equal(token["agreement"], 1.0)
        np.testing.assert_allclose(token["teacher_hard"], token["hard"], rtol=1e-6)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    student, teacher, targets = (jnp.asarray(x) for x in random_case(7, 1.0))
    student, teacher = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    low = token_losses(student, teacher, targets, 0.5, LossConfig(), VOCAB)
    full = token_losses(
        student.astype(jnp.float32), teacher.astype(jnp.float32), targets, 0.5, LossConfig(), VOCAB
    )
    for name, value in low.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, full[name])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"teacher_temperature": float("nan")}, "teacher_temperature is nan"),
        ({"student_temperature": -1.0}, "student_temperature is -1.0"),
        (
            {"divergence": "forward_kl"},
            r"set it to a divergence, such as @divergences\.ForwardKL\(\)",
        ),
        ({"divergence": ForwardKL}, "set it to a divergence"),
        ({"teacher_top_k": -1}, "teacher_top_k is -1"),
        ({"z_loss": -0.1}, "z_loss is -0.1"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LossConfig(**bad)


def test_top_k_above_the_vocabulary_is_named() -> None:
    student, teacher, targets = random_case(9, 1.0)
    with pytest.raises(
        InputError, match=f"teacher_top_k is 12, more than the vocabulary's {VOCAB}"
    ):
        token_losses(student, teacher, targets, 0.5, LossConfig(teacher_top_k=12), VOCAB)


@pytest.mark.parametrize(
    ("config", "teacher_vocab_size", "words"),
    [
        (LossConfig(teacher_top_k=9), 8, "teacher_top_k is 9, more than the vocabulary's 8"),
        (LossConfig(divergence=ReverseKL()), 8, "ReverseKL.., which is infinite for the 3 ids"),
        (LossConfig(), VOCAB + 1, f"The teacher has {VOCAB + 1} ids and the student {VOCAB}"),
    ],
)
def test_a_teacher_of_other_ids_is_refused(
    config: LossConfig, teacher_vocab_size: int, words: str
) -> None:
    student, teacher, targets = random_case(9, 1.0, teacher_ids=VOCAB + 1)
    with pytest.raises(InputError, match=words):
        token_losses(
            student, teacher, targets, 0.5, config, VOCAB, teacher_vocab_size=teacher_vocab_size
        )


def test_the_cosine_of_the_two_gradients_equals_numpy() -> None:
    student, teacher, targets = random_case(3, 1.0, VOCAB + 2, VOCAB + 5)
    config = LossConfig(teacher_temperature=0.5, gradient_cosine=True, z_loss=1e-2)
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x, jnp.float64) for x in (student, teacher))
        got = token_losses(*arrays, jnp.asarray(targets), 0.4, config, VOCAB)["gradient_cosine"]
    for at in np.ndindex(targets.shape):
        z, t = student[at][:VOCAB].astype(np.float64), teacher[at][:VOCAB].astype(np.float64)
        p, q = np.exp(log_softmax(z)), np.exp(log_softmax(t / 0.5))
        soft, hard = p - q, p - np.eye(VOCAB)[targets[at]]
        expected = soft @ hard / np.linalg.norm(soft) / np.linalg.norm(hard)
        assert got[at] == pytest.approx(expected, rel=1e-10)
