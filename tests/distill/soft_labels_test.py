"""Losses from stored soft labels: as from whole logits, and as from their own teacher."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill.chunked_loss import loss_sums, top_labels
from salt_jax.distill.gates import TruthInTop
from salt_jax.distill.head_sharding import HeadSharding
from salt_jax.distill.losses import LossConfig, SoftLabels
from salt_jax.distill.token_losses import token_losses
from salt_jax.errors import InputError
from salt_jax.training.partitioning import MeshConfig
from tests.distill.chunked_loss_test import (
    CONFIGS,
    EACH_CONFIG,
    MESHES,
    VOCAB,
    case,
    chunked,
    to_dtype,
    with_gradients,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def labels_of(
    arguments: dict[str, Any], config: LossConfig, k: int, sharding: HeadSharding | None = None
) -> SoftLabels:
    return top_labels(
        arguments["teacher_hidden_BxLxD"],
        arguments["teacher_head_VxD"],
        arguments["targets_BxL"],
        arguments["weights_BxL"],
        VOCAB,
        k=k,
        temperature=config.teacher_temperature,
        chunk_tokens=7,
        sharding=sharding,
    )


def without_teacher(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if not name.startswith("teacher")}


def whole_sums(config: LossConfig, soft_labels: SoftLabels, **arguments: Any) -> Any:
    weights_BxL = arguments["weights_BxL"]
    counts_BxL = weights_BxL > 0
    hidden_BxLxD = jnp.where(counts_BxL[..., None], arguments["student_hidden_BxLxD"], 0)
    logits_BxLxV = hidden_BxLxD @ arguments["student_head_VxD"].T
    targets_BxL = jnp.where(counts_BxL, arguments["targets_BxL"], 0)
    tokens = token_losses(
        logits_BxLxV, None, targets_BxL, arguments["omega"], config, VOCAB, soft_labels
    )
    sums = {name: jnp.sum(weights_BxL * value) for name, value in tokens.items()}
    return sums.pop("loss"), jnp.sum(weights_BxL), sums


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)


@EACH_CONFIG
def test_equals_whole_logits_in_float64(config: LossConfig) -> None:
    with jax.enable_x64(True):
        arguments = to_dtype(case(), jnp.float64)
        labels = labels_of(arguments, config, k=5)
        config = dataclasses.replace(config, teacher_top_k=min(config.teacher_top_k, 5))
        rest = {**without_teacher(arguments), "soft_labels": labels}
        want = with_gradients(functools.partial(whole_sums, config), rest)
        got = with_gradients(chunked(config, 7), rest)
    assert_same(got, want)


@EACH_CONFIG
def test_equals_the_teacher_that_they_were_made_by(config: LossConfig) -> None:
    """All ids are kept, or as many as the loss asks for, or more."""
    with jax.enable_x64(True):
        arguments = to_dtype(case(), jnp.float64)
        want = with_gradients(chunked(config, 7), arguments)
        for k in {config.teacher_top_k or VOCAB, min(config.teacher_top_k + 2, VOCAB) or VOCAB}:
            if config.teacher_top_k == 0 and k < VOCAB:
                continue
            labels = labels_of(arguments, config, k)
            rest = {**without_teacher(arguments), "soft_labels": labels}
            assert_same(with_gradients(chunked(config, 5), rest), want)


@settings(max_examples=5, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 6),
    k=st.integers(1, VOCAB),
    chunk_tokens=st.integers(1, 30),
)
def test_equals_whole_logits_at_any_shape(
    batch: int, length: int, k: int, chunk_tokens: int
) -> None:
    config = LossConfig(teacher_temperature=0.7)
    with jax.enable_x64(True):
        arguments = to_dtype(case(batch, length), jnp.float64)
        rest = {**without_teacher(arguments), "soft_labels": labels_of(arguments, config, k)}
        want = with_gradients(functools.partial(whole_sums, config), rest)
        got = with_gradients(chunked(config, chunk_tokens), rest)
    assert_same(got, want)


def test_kept_probabilities_and_the_rest_are_one() -> None:
    config = LossConfig()
    arguments = to_dtype(case(), jnp.float32)
    labels = labels_of(arguments, config, k=4)
    total_BxL = np.exp(np.asarray(labels.log_q)).sum(-1) + np.exp(np.asarray(labels.rest))
    np.testing.assert_allclose(total_BxL, 1.0, rtol=1e-5)
    assert np.all(np.diff(np.asarray(labels.log_q), axis=-1) <= 0)
    assert labels.ids.dtype == jnp.int32
    assert int(labels.ids.max()) < VOCAB


@pytest.mark.parametrize(("sizes", "embed"), MESHES[1:4], ids=str)
def test_equal_on_one_device_and_on_eight(sizes: tuple[int, ...], embed: tuple[str, ...]) -> None:
    config = CONFIGS[9]
    with jax.enable_x64(True):
        arguments = to_dtype(case(), jnp.float64)
        alone = labels_of(arguments, config, k=4)
        mesh = MeshConfig(*sizes).make()
        sharding = HeadSharding(mesh, ("slice", "data", "fsdp"), ("tensor",), embed)
        want = with_gradients(
            chunked(config, 7), {**without_teacher(arguments), "soft_labels": alone}
        )
        with jax.set_mesh(mesh):
            spread = jax.tree.map(np.asarray, labels_of(arguments, config, 4, sharding))
            rest = {**without_teacher(arguments), "soft_labels": spread}
            got = with_gradients(chunked(config, 2, sharding=sharding), rest)
    counts_BxL = np.asarray(arguments["weights_BxL"]) > 0
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_allclose(np.asarray(one)[counts_BxL], other[counts_BxL], **CLOSE)
    assert_same(got, want)


def test_positions_without_weight_may_hold_anything() -> None:
    config = LossConfig()
    arguments = to_dtype(case(), jnp.float32)
    labels = labels_of(arguments, config, k=3)
    counts_BxL = arguments["weights_BxL"] > 0
    empty = jax.tree.map(
        lambda x: jnp.where(counts_BxL.reshape(counts_BxL.shape + (1,) * (x.ndim - 2)), x, 0),
        labels,
    )
    results = [
        with_gradients(chunked(config, 7), {**without_teacher(arguments), "soft_labels": each})
        for each in (labels, empty)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_refusals() -> None:
    arguments = to_dtype(case(), jnp.float32)
    labels = labels_of(arguments, LossConfig(), k=3)
    with pytest.raises(InputError, match="teacher_top_k is 4 and the soft labels have 3 ids"):
        chunked(LossConfig(teacher_top_k=4), 7)(**without_teacher(arguments), soft_labels=labels)
    gated = LossConfig(gate=TruthInTop(4))
    with pytest.raises(InputError, match=r"teacher's 4 most likely ids .* the loss 3 a token"):
        chunked(gated, 7)(**without_teacher(arguments), soft_labels=labels)
    with pytest.raises(ValueError, match="replace a teacher"):
        loss_sums(**arguments, config=LossConfig(), vocab_size=VOCAB, soft_labels=labels)
