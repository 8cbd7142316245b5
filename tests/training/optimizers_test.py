"""What each optimizer does to the parameters, by formulas written out here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from salt_jax.errors import InputError
from salt_jax.models import decoder
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training.learning_rates import WarmupConstant, WarmupCosine
from salt_jax.training.optimizers import Adafactor, AdamW, Muon, is_matrix, make_transformation

MODEL = DecoderConfig(
    embed_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    vocab_size=64,
    tied_embeddings=False,
)
RATE = WarmupCosine(0.01, warmup_steps=2, final=0.001)
STEPS = 8


def randoms(seed: int, scale: float = 1.0, model: DecoderConfig = MODEL) -> Any:
    """Random numbers in the form of the model's parameters."""
    shapes = nn.unbox(decoder.abstract_params(model))
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * draw.standard_normal(leaf.shape), jnp.float32), shapes
    )


def after(optimizer: optax.GradientTransformation, steps: int = 3) -> tuple[Any, Any]:
    """Parameters and state after some steps of random gradients."""
    params = randoms(0)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(randoms(1 + step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def adamw(weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(
        RATE.schedule(STEPS), b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay, mask=is_matrix
    )


def adafactor(weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(
        optax.adafactor(learning_rate=None),
        optax.add_decayed_weights(-weight_decay, mask=is_matrix),
        optax.scale_by_schedule(RATE.schedule(STEPS)),
    )


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize(("ours", "written_out"), [(AdamW, adamw), (Adafactor, adafactor)])
def test_updates_and_state_are_those_of_the_formula(
    ours: Any, written_out: Any, clip_norm: float
) -> None:
    """Bit for bit, and in a state of the same form: checkpoints of before go on."""
    optimizer = ours(RATE, weight_decay=0.1, clip_norm=clip_norm)
    expected = written_out(0.1)
    if clip_norm:
        expected = optax.chain(optax.clip_by_global_norm(clip_norm), expected)
    actual, expected = after(optimizer.make(STEPS, MODEL)), after(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("optimizer", [AdamW, Adafactor, Muon])
def test_weight_decay_is_for_matrices(optimizer: Any) -> None:
    model = dataclasses.replace(MODEL, use_bias=True)
    made = optimizer(WarmupConstant(0.5), weight_decay=0.2, clip_norm=0).make(STEPS, model)
    params = randoms(0, model=model)
    updates, _ = made.update(jax.tree.map(jnp.zeros_like, params), made.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        decayed = path[-1].key in ("kernel", "embedding", "head")
        param = params
        for key in path:
            param = param[key.key]
        np.testing.assert_allclose(update, -0.1 * param if decayed else 0 * param, rtol=1e-6)


def test_clipping() -> None:
    rate = WarmupConstant(1.0)
    made = AdamW(rate, epsilon=1.0, beta1=0.0, beta2=0.0, clip_norm=1.0).make(STEPS, MODEL)
    params = {"kernel": jnp.zeros((2, 2))}
    updates, _ = made.update({"kernel": jnp.full((2, 2), 100.0)}, made.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 / (0.5 + 1.0), rtol=1e-5)


def orthogonalized(matrix: Any) -> Any:
    """Muon's five Newton-Schulz steps, in float64."""
    x = np.asarray(matrix, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x


def muon_update(optimizer: Muon, model: DecoderConfig, gradients: Any) -> Any:
    params = jax.tree.map(jnp.zeros_like, gradients)
    made = optimizer.make(STEPS, model)
    return made.update(gradients, made.init(params), params)[0]


MUON = Muon(WarmupConstant(0.5), clip_norm=0, adam_learning_rate=WarmupConstant(0.25))


def test_muon_orthogonalizes_each_layers_kernel_from_inputs_to_outputs() -> None:
    gradients = randoms(1)
    updates = muon_update(MUON, MODEL, gradients)["layers"]
    width, heads, kv_heads, head = 16, 4, 2, 4
    shapes = {
        ("attention", "query"): (width, heads * head),
        ("attention", "key"): (width, kv_heads * head),
        ("attention", "value"): (width, kv_heads * head),
        ("attention", "out"): (heads * head, width),
        ("mlp", "up"): (width, 24),
        ("mlp", "gate"): (width, 24),
        ("mlp", "down"): (24, width),
    }
    for (part, name), shape in shapes.items():
        for layer in range(MODEL.num_layers):
            gradient = gradients["layers"][part][name]["kernel"][layer].reshape(shape)
            update = updates[part][name]["kernel"][layer].reshape(shape)
            # The first step's Nesterov momentum is the gradient times a number.
            expected = orthogonalized(gradient) * 0.2 * max(shape) ** 0.5
            np.testing.assert_allclose(update, -0.5 * expected, atol=2e-4)
            singular = np.linalg.svd(update, compute_uv=False) / (0.1 * max(shape) ** 0.5)
            assert np.median(singular) > 0.7
            assert singular.max() < 1.3
    assert {(part, name) for part in ("attention", "mlp") for name in updates[part]} == {*shapes}


def test_muon_leaves_the_rest_to_adam_at_its_own_rate() -> None:
    updates = muon_update(MUON, MODEL, randoms(1))
    norms = [updates["layers"][name]["scale"] for name in ("attention_norm", "mlp_norm")]
    for update in (updates["embedding"], updates["head"], updates["final_norm"]["scale"], *norms):
        # Adam's first step is the rate times the gradient's sign, times what Nesterov makes of it.
        np.testing.assert_allclose(np.abs(update), 0.25 * (1 + 0.9 * 0.1 / 0.19), rtol=1e-3)
    both = dataclasses.replace(MUON, adam_learning_rate=None)
    twice = muon_update(both, MODEL, randoms(1))["head"]
    np.testing.assert_allclose(twice, 2 * updates["head"], rtol=1e-6)


def test_muon_of_scanned_layers_is_that_of_layers_apart() -> None:
    gradients = randoms(1)
    scanned = muon_update(MUON, MODEL, gradients)
    apart = {name: value for name, value in gradients.items() if name != "layers"}
    for layer in range(MODEL.num_layers):
        apart[f"layers_{layer}"] = jax.tree.map(lambda leaf, i=layer: leaf[i], gradients["layers"])
    unscanned = muon_update(MUON, dataclasses.replace(MODEL, scan_layers=False), apart)
    for layer in range(MODEL.num_layers):
        jax.tree.map(
            lambda one, all_, i=layer: np.testing.assert_allclose(one, all_[i], atol=1e-6),
            unscanned[f"layers_{layer}"],
            scanned["layers"],
        )
    np.testing.assert_array_equal(unscanned["embedding"], scanned["embedding"])


def test_muon_scales_by_width_where_no_rms_is_asked_for() -> None:
    plain = dataclasses.replace(MUON, update_rms=None)
    update = muon_update(plain, MODEL, randoms(1))["layers"]["mlp"]["up"]["kernel"][0]
    expected = orthogonalized(randoms(1)["layers"]["mlp"]["up"]["kernel"][0]) * (24 / 16) ** 0.5
    np.testing.assert_allclose(update, -0.5 * expected, atol=2e-4)


class _NoTransformation:
    learning_rate = RATE

    def make(self, steps: int, model: DecoderConfig) -> int:
        return steps


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer is WarmupCosine, which lacks make"):
        make_transformation(RATE, STEPS, MODEL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="optimizer is AdamW, which lacks"):
        make_transformation(AdamW(0.1), STEPS, MODEL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="make returned int, expected an optax"):
        make_transformation(_NoTransformation(), STEPS, MODEL)  # type: ignore[arg-type]
