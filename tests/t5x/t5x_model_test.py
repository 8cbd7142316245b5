"""SALT in T5X: its loss is salt_jax's, and T5X's own train.py runs both stages.

All but the first test want T5X, which is no requirement: docs/t5x.md says how to run them.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from salt_jax.cli.config_files import CONFIGS
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill.chunked_loss import loss_sums
from salt_jax.distill.divergences import JensenShannon, ReverseKL
from salt_jax.distill.losses import LossConfig, SoftLabels
from salt_jax.distill.token_losses import token_losses
from salt_jax.errors import InputError
from salt_jax.t5x import packed_rows
from salt_jax.t5x.packed_rows import PackedRows
from tests.t5x.packed_rows_test import LOSS, write_labels

needs_t5x = pytest.mark.skipif(
    importlib.util.find_spec("t5x") is None, reason="T5X is not installed: see docs/t5x.md"
)
BATCH, OMEGA, Z_LOSS, IDS = 8, 0.6, 1e-3, 320
CONFIGS_OF_LOSS = [
    LOSS,
    dataclasses.replace(LOSS, teacher_top_k=2),
    dataclasses.replace(LOSS, student_temperature=2.0, scale_by_temperature_squared=True),
    dataclasses.replace(LOSS, divergence=ReverseKL()),
    dataclasses.replace(LOSS, divergence=JensenShannon(0.3)),
]
DIVISORS = [None, 100.0, "NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS"]
DIVISORS += ["AVERAGE_PER_SEQUENCE"]

Batch = dict[str, jax.Array]


def test_without_t5x_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "t5x", None)
    monkeypatch.delitem(sys.modules, "salt_jax.t5x.t5x_model", raising=False)
    words = r"T5X needs the library t5x, .* docs/t5x\.md says how"
    with pytest.raises(ModuleNotFoundError, match=words):
        importlib.import_module("salt_jax.t5x.t5x_model")


@pytest.fixture(scope="module", autouse=True)
def t5x_promotes_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def labels(cache: PackedCache, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("labels"), cache)


@pytest.fixture(scope="module")
def batch(cache: PackedCache, labels: str) -> Batch:
    rows = PackedRows(str(cache.path), BATCH, soft_labels=labels, loss=LOSS)
    dataset = rows.dataset("train", shuffle_files=False).batch(BATCH)
    return jax.tree.map(jnp.asarray, next(dataset.as_numpy_iterator()))


class Bigram(nn.Module):
    """A network that T5X's classes take, and that compiles at once."""

    ids: int

    @nn.compact
    def __call__(self, inputs_BxL: jax.Array, targets_BxL: jax.Array, **settings: Any) -> jax.Array:
        return nn.Embed(self.ids, self.ids)(inputs_BxL.astype(jnp.int32))


def model(cache: PackedCache, ids: int = IDS, salt: bool = True, **settings: Any) -> Any:
    """Ours, or T5X's own, with a network that has more logits than the vocabulary has ids."""
    from t5x import models

    from salt_jax.t5x.t5x_model import SaltDecoderOnlyModel

    kind = SaltDecoderOnlyModel if salt else models.DecoderOnlyModel
    vocabulary = packed_rows.vocabulary(str(cache.path))
    return kind(Bigram(ids), vocabulary, None, **{"z_loss": Z_LOSS} | settings)


@pytest.fixture(scope="module")
def params(cache: PackedCache, batch: Batch) -> Any:
    shapes = {name: array.shape for name, array in batch.items()}
    variables = model(cache, salt=False).get_initial_variables(jax.random.key(0), shapes)
    return variables["params"]


def value_and_gradients(one: Any, params: Any, batch: Batch) -> tuple[Any, Any, Any]:
    loss = functools.partial(one.loss_fn, batch=batch, dropout_rng=None)
    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return (
        float(value),
        gradients,
        {name: float(m.compute()) for name, m in metrics.items() if counts(m)},
    )


def counts(metric: Any) -> bool:
    """Whether a metric is more than a time."""
    return "Time" not in type(metric).__name__


def assert_close(got: Any, want: Any, rtol: float) -> None:
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), got, want
    )


@needs_t5x
@pytest.mark.parametrize("loss", CONFIGS_OF_LOSS, ids=lambda loss: f"{loss.divergence}")
def test_the_loss_is_that_of_salt_train(
    cache: PackedCache, batch: Batch, params: Any, loss: LossConfig
) -> None:
    """Its chunked one, by the same logits, and the reference in float64."""
    ours = model(cache, omega=OMEGA, loss=loss)
    value, gradients, metrics = value_and_gradients(ours, params, batch)
    config = dataclasses.replace(loss, z_loss=Z_LOSS)
    labels = [batch[f"soft_{name}"] for name in ("ids", "log_q", "rest", "teacher_loss")]
    targets_BxL, weights_BxL = batch["decoder_target_tokens"], batch["decoder_loss_weights"]

    def chunked(params: Any) -> Any:
        logits_BxLxV = ours._compute_logits(params, batch)
        arrays = logits_BxLxV, jnp.eye(IDS), targets_BxL, weights_BxL
        return loss_sums(*arrays, OMEGA, config, IDS, soft_labels=SoftLabels(*labels))[0]

    want, want_gradients = jax.jit(jax.value_and_grad(chunked))(params)
    assert_close(value, want, 1e-6)
    assert_close(gradients, want_gradients, 1e-5)
    logits = np.asarray(ours._compute_logits(params, batch))
    with jax.enable_x64(True):
        exact = [np.asarray(x, None if x.dtype == np.int32 else np.float64) for x in labels]
        token = token_losses(
            jnp.asarray(logits, jnp.float64),
            None,
            np.asarray(targets_BxL),
            OMEGA,
            config,
            IDS,
            SoftLabels(*map(jnp.asarray, exact)),
        )
        sums = {k: float(np.sum(np.asarray(weights_BxL) * v)) for k, v in token.items()}
    assert_close(value, sums["loss"], 1e-6)
    tokens = float(weights_BxL.sum())
    for name, metric in (
        ("hard", "hard_loss"),
        ("soft", "soft_loss"),
        ("teacher_hard", "teacher_loss"),
    ):
        found = metrics[f"{metric}_per_nonpadding_target_token"]
        assert found == pytest.approx(sums[name] / tokens, rel=1e-6)
    assert metrics["teacher_agreement"] == pytest.approx(sums["agreement"] / tokens)


@needs_t5x
@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
def test_without_omega_it_is_t5xs_own_loss(
    cache: PackedCache, batch: Batch, params: Any, divisor: Any
) -> None:
    """Value, gradients and metrics, however T5X divides; ids beyond the vocabulary count there."""
    settings = {"loss_normalizing_factor": divisor}
    ours = value_and_gradients(model(cache, omega=0.0, loss=LOSS, **settings), params, batch)
    theirs = value_and_gradients(model(cache, salt=False, **settings), params, batch)
    for got, want in zip(ours[:2], theirs[:2], strict=True):
        assert_close(got, want, 1e-5)
    assert ours[2] == {**ours[2], **{k: pytest.approx(v, rel=1e-5) for k, v in theirs[2].items()}}
    added = {name for name in ours[2] if name not in theirs[2]}
    assert added == {
        *("hard_loss_per_nonpadding_target_token", "soft_loss_per_nonpadding_target_token"),
        *("teacher_loss_per_nonpadding_target_token", "teacher_agreement"),
    }


@needs_t5x
@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
def test_the_divisor_is_t5xs(cache: PackedCache, batch: Batch, params: Any, divisor: Any) -> None:
    """The loss is linear in ω, divided as a whole."""
    losses = [
        value_and_gradients(
            model(cache, omega=omega, loss=LOSS, loss_normalizing_factor=divisor), params, batch
        )[0]
        for omega in (0.0, OMEGA, 1.0)
    ]
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    assert losses[1] == pytest.approx((1 - OMEGA) * losses[0] + OMEGA * losses[2], rel=1e-6)


@needs_t5x
def test_a_batch_without_labels_has_t5xs_own_loss(
    cache: PackedCache, batch: Batch, params: Any
) -> None:
    plain = {name: array for name, array in batch.items() if name.startswith("decoder_")}
    ours = value_and_gradients(model(cache, omega=OMEGA, loss=LOSS), params, plain)
    theirs = value_and_gradients(model(cache, salt=False), params, plain)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@needs_t5x
def test_microbatches_add_up(cache: PackedCache, batch: Batch, params: Any) -> None:
    from t5x import trainer

    ours = model(cache, omega=OMEGA, loss=LOSS)
    state = types.SimpleNamespace(params=params, flax_mutables=None)
    key = jax.random.key(0)
    (whole, metrics, _), (parts, summed, _) = (
        trainer.accumulate_grads_microbatched(ours, state, batch, key, count) for count in (1, 4)
    )
    assert_close(parts, whole, 1e-5)
    for name in ("soft_loss_per_nonpadding_target_token", "teacher_agreement"):
        want = float(metrics[name].compute())
        assert float(summed[name].compute()) == pytest.approx(want, rel=1e-5)


@needs_t5x
def test_refusals(cache: PackedCache, batch: Batch, params: Any) -> None:
    for words, settings in (
        ("omega is 1.5", {"omega": 1.5}),
        ("LABEL_SMOOTHING is 0.1", {"label_smoothing": 0.1}),
        ("LossConfig.z_loss is 0.5", {"loss": LossConfig(z_loss=0.5)}),
    ):
        with pytest.raises(InputError, match=words):
            model(cache, **settings)
    few = model(cache, ids=64)
    shapes = {name: array.shape for name, array in batch.items()}
    own = few.get_initial_variables(jax.random.key(0), shapes)["params"]
    with pytest.raises(
        InputError, match="has 64 logits and the vocabulary 259 ids: set VOCAB_SIZE"
    ):
        few.loss_fn(own, batch, None)
    more = model(cache, loss=dataclasses.replace(LOSS, teacher_top_k=4))
    with pytest.raises(InputError, match="teacher_top_k is 4 and the soft labels have 3 ids"):
        more.loss_fn(params, batch, None)


def launch(folder: pathlib.Path, cache: PackedCache, stage: str, steps: int, **macros: Any) -> None:
    """T5X's own train.py, on two devices."""
    values = {
        **{"CACHE": str(cache.path), "MODEL_DIR": str(folder), "VOCAB_SIZE": IDS},
        **{"TRAIN_STEPS": steps, "BATCH_SIZE": BATCH, "WARMUP_STEPS": 8, "LOG_EVERY": 1},
        **{"SAVE_EVERY": 20, "EVALUATE_EVERY": 20, **macros},
    }
    command = [sys.executable, "-m", "t5x.train", f"--gin_search_paths={CONFIGS}"]
    command += ["--gin_file=t5x/tiny.gin", f"--gin_file=t5x/{stage}.gin"]
    command += [f"--gin.{name}={value!r}" for name, value in values.items()]
    devices = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": devices}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


def scalars(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """What T5X wrote of training, by name and step."""
    import tensorflow as tf

    found: dict[str, dict[int, float]] = {}
    for file in sorted((folder / "train").glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                if value.HasField("tensor") and value.tensor.dtype != tf.string.as_datatype_enum:
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, {})[event.step] = number
    return found


@needs_t5x
@pytest.mark.slow
def test_t5xs_train_runs_both_stages(
    cache: PackedCache, labels: str, tmp_path: pathlib.Path
) -> None:
    teaching = {"SOFT_LABELS": labels, "TEACHER_TEMPERATURE": LOSS.teacher_temperature}
    launch(tmp_path, cache, "stage1", 12, **teaching, OMEGA=0.1)
    taught = scalars(tmp_path)
    hard = taught["hard_loss_per_nonpadding_target_token"]
    assert hard[12] < 0.8 * hard[1]
    launch(tmp_path, cache, "stage2", 20, FIRST_STEP=12)
    seen = scalars(tmp_path)
    assert sorted(seen["loss"]) == list(range(1, 21))
    assert sorted(seen["soft_loss_per_nonpadding_target_token"]) == list(range(1, 13))
    # Neither the parameters nor the learning rate begin anew.
    assert seen["loss_per_nonpadding_target_token"][13] < 0.8 * hard[1]
    rates = seen["learning_rate"]
    for step in (9, 12, 13, 20):
        assert rates[step] == pytest.approx(max(step - 1, 8) ** -0.5, rel=1e-5)
    assert {"checkpoint_12", "checkpoint_20"} <= {path.name for path in tmp_path.iterdir()}
