"""The decoder: what sees what, and that every way of computing it is the same function."""

import dataclasses
import functools
import json
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from salt_jax.errors import InputError
from salt_jax.models import decoder, layers
from salt_jax.models.decoder import Decoder, DecoderConfig
from salt_jax.models.rope_scaling import RopeScaling

SMALL = DecoderConfig(embed_dim=16, num_layers=2, num_heads=4, mlp_dim=24, vocab_size=50)
GPT_NEOX = dataclasses.replace(
    SMALL,
    norm="layernorm",
    use_bias=True,
    parallel_residual=True,
    rope_fraction=0.5,
    gated_mlp=False,
    mlp_activation="gelu",
    tied_embeddings=False,
    scale_embeddings=False,
)
LLAMA = dataclasses.replace(SMALL, num_kv_heads=2, head_dim=8, tied_embeddings=False)
# As in Gemma 3, and all other options: layers differ in window and rotation.
MIXED = dataclasses.replace(
    LLAMA,
    norm_placement="both",
    qk_norm="head",
    qkv_bias=True,
    layer_kinds=("local", "global"),
    window=3,
    local_rope_theta=100.0,
    rope_scaling=RopeScaling("linear", 2.0),
    attention_scale=0.4,
    attention_soft_cap=2.0,
    residual_multiplier=0.5,
    logits_divisor=2.0,
    logits_soft_cap=3.0,
    learned_positions=True,
    max_length=32,
)
SHAPES = pytest.mark.parametrize(
    "config", [SMALL, GPT_NEOX, LLAMA, MIXED], ids=["tied", "neox", "llama", "mixed"]
)


@functools.partial(jax.jit, static_argnums=0)
def make_params(config: DecoderConfig) -> Any:
    """Parameters with nothing at its special initial value, so that every one has an effect."""
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def one_segment(length: int, batch: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs = jax.random.randint(jax.random.key(2), (batch, length), 0, 50)
    return inputs, jnp.ones_like(inputs), jnp.tile(jnp.arange(length)[None], (batch, 1))


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config: DecoderConfig, params: Any, *row: jax.Array) -> jax.Array:
    hidden_BxLxD = Decoder(config).apply({"params": params}, *row)
    return decoder.logits(hidden_BxLxD, decoder.head_kernel(params, config), config)


def unstacked(params: Any, num_layers: int) -> Any:
    """The parameters of a scanned model laid out for one that is not."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    apart = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(num_layers)
    }
    return {**rest, **apart}


@SHAPES
def test_causality_by_gradients(config: DecoderConfig) -> None:
    """The hidden state at i depends on the inputs up to i, on each of them, and on no later one."""
    params, (_, segments, positions) = make_params(config), one_segment(6)
    inputs = jnp.arange(6)[None]  # each id stands once: row j of the embedding is input j alone

    @jax.jit
    @jax.jacobian
    def jacobian(embedding_VxD: jax.Array) -> jax.Array:
        mine = {"params": {**params, "embedding": embedding_VxD}}
        hidden_BxLxD: jax.Array = Decoder(config).apply(mine, inputs, segments, positions)
        return hidden_BxLxD[0]

    depends_LxL = np.abs(jacobian(params["embedding"])).sum(axis=(1, 3))[:, :6]
    assert (depends_LxL[np.triu_indices(6, k=1)] == 0).all()
    assert (depends_LxL[np.tril_indices(6)] > 0).all()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_prefix_in_both_directions_by_gradients(remat: str) -> None:
    """Two documents: of each the prefix sees all of itself, the rest what came before it."""
    config = dataclasses.replace(SMALL, remat=remat)
    params, inputs = make_params(config), jnp.arange(8)[None]
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0]])
    prefix = jnp.array([[True, True, True, False, True, True, False, False]])
    batch = {
        "inputs": inputs,
        "segment_ids": segments,
        "positions": positions,
        "bidirectional": prefix,
    }

    @jax.jit
    @jax.jacobian
    def jacobian(embedding_VxD: jax.Array) -> jax.Array:
        return decoder.hidden_states(config, {**params, "embedding": embedding_VxD}, batch)[0]

    depends_LxL = np.abs(jacobian(params["embedding"])).sum(axis=(1, 3))[:, :8] > 0
    expected = np.zeros((8, 8), bool)
    expected[:3, :3] = expected[3, :4] = True
    expected[4:6, 4:6] = expected[6, 4:7] = expected[7, 7] = True
    np.testing.assert_array_equal(depends_LxL, expected)
    nothing = {**batch, "bidirectional": jnp.zeros((1, 8), bool)}
    causal = {name: array for name, array in batch.items() if name != "bidirectional"}
    np.testing.assert_array_equal(
        decoder.hidden_states(config, params, nothing),
        decoder.hidden_states(config, params, causal),
    )


@SHAPES
def test_packed_documents_equal_documents_alone(config: DecoderConfig) -> None:
    params, lengths = make_params(config), (5, 1, 7)
    documents = [one_segment(length) for length in lengths]
    inputs = jnp.concatenate([d[0] for d in documents] + [jnp.full((1, 3), 49)], axis=1)
    positions = jnp.concatenate([d[2] for d in documents] + [jnp.zeros((1, 3), int)], axis=1)
    segments = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([*lengths, 3]))[None]
    packed = all_logits(config, params, inputs, segments, positions)
    start = 0
    for document, length in zip(documents, lengths, strict=True):
        alone = all_logits(config, params, *document)
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-4)
        start += length
    assert np.isfinite(packed).all()


@SHAPES
def test_scan_equals_no_scan(config: DecoderConfig) -> None:
    params, row = make_params(config), one_segment(8, batch=2)
    loop = dataclasses.replace(config, scan_layers=False)
    loop_params = unstacked(params, config.num_layers)
    fresh = jax.tree.structure(nn.unbox(decoder.abstract_params(loop)))
    assert jax.tree.structure(loop_params) == fresh
    np.testing.assert_allclose(
        all_logits(config, params, *row), all_logits(loop, loop_params, *row), atol=1e-5
    )


@SHAPES
def test_fresh_model_knows_nothing(config: DecoderConfig) -> None:
    """Loss at the start is log V, for wide models too."""
    for embed_dim in (64, 512):
        wide = dataclasses.replace(
            config, embed_dim=embed_dim, mlp_dim=2 * embed_dim, vocab_size=500, vocab_multiple=1
        )
        row = one_segment(32, batch=2)
        params = jax.jit(lambda wide=wide: nn.unbox(decoder.init_params(wide, jax.random.key(0))))()
        logits = all_logits(wide, params, *row)
        # The expected loss for a truth that can be any id.
        loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1))
        assert loss == pytest.approx(np.log(500), abs=0.15)


@pytest.mark.parametrize("tied_embeddings", [True, False])
@pytest.mark.parametrize("scale_embeddings", [True, False])
def test_embedded_inputs_are_as_large_as_said(
    tied_embeddings: bool, scale_embeddings: bool
) -> None:
    config = dataclasses.replace(
        SMALL,
        embed_dim=64,
        vocab_size=1024,
        tied_embeddings=tied_embeddings,
        scale_embeddings=scale_embeddings,
    )
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    head_std = float(jnp.std(decoder.head_kernel(params, config)))
    assert head_std == pytest.approx(0.3 / 8, rel=0.05)  # of 8 = √64
    input_std = float(jnp.std(params["embedding"])) * (8 if scale_embeddings else 1)
    small = tied_embeddings and not scale_embeddings
    assert input_std == pytest.approx(0.3 / 8 if small else 0.3, rel=0.05)


def test_scaled_embeddings_equal_a_larger_table() -> None:
    params, row = make_params(LLAMA), one_segment(8)
    unscaled = dataclasses.replace(LLAMA, scale_embeddings=False)
    larger = {**params, "embedding": params["embedding"] * 4}  # 4 = √16
    scaled = all_logits(LLAMA, params, *row)
    np.testing.assert_allclose(scaled, all_logits(unscaled, larger, *row), atol=1e-4)


@SHAPES
def test_counts_of_parameters(config: DecoderConfig) -> None:
    params = nn.unbox(decoder.abstract_params(config))
    assert config.num_parameters == sum(x.size for x in jax.tree.leaves(params))
    kernels = jax.tree_util.tree_flatten_with_path(params["layers"])[0]
    kernel_sizes = [x.size for path, x in kernels if path[-1].key == "kernel"]
    head = decoder.head_kernel(params, config) if not config.tied_embeddings else None
    head_size = head.size if head is not None else params["embedding"].size
    assert config.num_matmul_parameters == sum(kernel_sizes) + head_size


@SHAPES
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_has_logical_axes(config: DecoderConfig, scan_layers: bool) -> None:
    config = dataclasses.replace(config, scan_layers=scan_layers)
    known = {"vocab", "embed", "mlp", "heads", "kv_heads", "head_dim", "layers", None}
    boxes = jax.tree.leaves(
        decoder.abstract_params(config), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= known
    stacked = [box for box in boxes if box.names[0] == "layers"]
    assert bool(stacked) == scan_layers
    assert all(box.value.shape[0] == config.num_layers for box in stacked)


@SHAPES
def test_kernels_say_which_axes_are_inputs(config: DecoderConfig) -> None:
    """As the projections have them, and a layer's place before them where layers are scanned."""
    inputs: dict[tuple[str, ...], int] = {}

    def note(
        call: Any, arguments: Any, settings: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, layers.Projection):
            inputs[context.module.path] = len(context.module.inputs)
        return call(*arguments, **settings)

    apart = dataclasses.replace(config, scan_layers=False)
    with nn.intercept_methods(note):
        kernels = decoder.kernel_axes(apart)
    scanned = decoder.kernel_axes(dataclasses.replace(config, scan_layers=True))
    found = jax.tree_util.tree_leaves_with_path(kernels, is_leaf=lambda x: isinstance(x, tuple))
    assert len(inputs) == len(found) > 0
    for path, axes in found:
        *module, name = (part.key for part in path)
        count = inputs[tuple(module)]
        assert name == "kernel"
        assert axes[0] == tuple(range(count))
        assert axes[1] == tuple(range(count, count + len(axes[1])))
        of_layers = functools.reduce(operator.getitem, (*module[1:], name), scanned["layers"])
        assert of_layers == tuple(tuple(axis + 1 for axis in side) for side in axes)


@SHAPES
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_early_layers_states(config: DecoderConfig, layer: int) -> None:
    """They are those of a model that ends there, but for the norm, and nothing else changes."""
    config = dataclasses.replace(config, num_layers=3)
    params, row = make_params(config), one_segment(8)
    names = ("inputs", "segment_ids", "positions")
    batch = dict(zip(names, row, strict=True))
    of_early = {**params, "layers": jax.tree.map(lambda x: x[:layer], params["layers"])}
    kinds = config.kinds_of_layers[:layer]
    window = config.window if "local" in kinds else None
    short = dataclasses.replace(config, num_layers=layer, layer_kinds=kinds, window=window)
    options = (config.norm, config.norm_epsilon, config.use_bias, "float32", "float32")
    norm = layers.Norm(*options, ((config.embed_dim, "embed"),))
    apart = unstacked(params, 3)
    for scanned, own in ((True, params), (False, apart)):
        form = dataclasses.replace(config, scan_layers=scanned)

        @functools.partial(jax.jit, static_argnums=0)
        def states(form: DecoderConfig, own: Any) -> Any:
            return decoder.early_and_last_states(form, own, batch, layer)

        early, last = states(form, own)
        normed = norm.apply({"params": params["final_norm"]}, early)
        expected = decoder.hidden_states(short, of_early, batch)
        expected *= config.logits_divisor
        np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-5)
        expected = decoder.hidden_states(form, own, batch)
        np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


@SHAPES
def test_a_stacked_model_repeats_its_layers(config: DecoderConfig) -> None:
    params = make_params(config)
    deep = decoder.stacked_params(params, config, 5)
    for got, leaf in zip(
        jax.tree.leaves(deep["layers"]), jax.tree.leaves(params["layers"]), strict=True
    ):
        np.testing.assert_array_equal(got, np.stack([leaf[i] for i in (0, 1, 0, 1, 0)]))
    apart = dataclasses.replace(config, scan_layers=False)
    other = decoder.stacked_params(unstacked(params, 2), apart, 5)
    jax.tree.map(np.testing.assert_array_equal, other, unstacked(deep, 5))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_layers_states_are_kept_for_an_early_one(remat: str) -> None:
    config = dataclasses.replace(SMALL, num_layers=12, remat=remat)
    params, row = decoder.abstract_params(config), one_segment(256, batch=2)
    batch = dict(zip(("inputs", "segment_ids", "positions"), row, strict=True))

    def last(params: Any) -> jax.Array:
        return jnp.sum(decoder.hidden_states(config, params, batch) ** 2)

    def both(params: Any) -> jax.Array:
        early, last = decoder.early_and_last_states(config, params, batch, 3)
        return jnp.sum(early**2) + jnp.sum(last**2)

    temporary = []
    for loss in (last, both):
        compiled = jax.jit(jax.grad(loss)).lower(nn.unbox(params)).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    states, parameters = 4 * 2 * 256 * 16, 4 * config.num_parameters
    assert temporary[1] < temporary[0] + 3 * states + 3 * parameters


def test_bfloat16_computes_over_float32_parameters() -> None:
    config = dataclasses.replace(GPT_NEOX, dtype="bfloat16")
    params, row = make_params(config), one_segment(8)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = Decoder(config).apply({"params": params}, *row)
    assert hidden.dtype == jnp.bfloat16
    logits = all_logits(config, params, *row)
    assert logits.dtype == jnp.float32
    exact = all_logits(GPT_NEOX, params, *row)
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("remat", ["minimal", "attention_output", "full"])
def test_mixed_layers_have_the_same_gradients_recomputed(remat: str) -> None:
    params, row = make_params(MIXED), one_segment(8)

    def gradients(config: DecoderConfig) -> Any:
        return jax.jit(jax.grad(lambda params: jnp.square(all_logits(config, params, *row)).sum()))(
            params
        )

    recomputed = gradients(dataclasses.replace(MIXED, remat=remat))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3),
        *(recomputed, gradients(MIXED)),
    )


def test_json_round_trip() -> None:
    for config in (GPT_NEOX, MIXED):
        assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(InputError, match="colour"):
        DecoderConfig.from_json({**SMALL.to_json(), "colour": "red"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"embed_dim": 18}, "embed_dim 18 is not a multiple of num_heads 4"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"mlp_activation": "tanh"}, "silu, gelu, gelu_tanh, relu"),
        ({"remat": "some"}, "none, minimal, attention, attention_output, full, offload"),
        ({"attention_backend": "abacus"}, "one of auto, xla, cudnn, splash"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5"),
        ({"rope_fraction": 0.25}, "an odd number"),
        ({"rope_theta": 0.0}, "rope_theta is 0"),
        ({"window": 3}, "window is 3 and layer_kinds"),
        ({"layer_kinds": ("local",)}, "window is None and layer_kinds"),
        ({"layer_kinds": ("near",)}, "global, local, nope"),
        ({"attention_soft_cap": -1.0}, "attention_soft_cap is -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dataclasses.replace(SMALL, **settings)


def test_unset_vocabulary_and_too_long_rows_are_named() -> None:
    with pytest.raises(InputError, match="vocab_size is not set"):
        decoder.abstract_params(dataclasses.replace(SMALL, vocab_size=None))
    config = dataclasses.replace(SMALL, max_length=7)
    with pytest.raises(InputError, match="max_length, now 7"):
        all_logits(config, make_params(config), *one_segment(8))


def test_vocabulary_is_padded() -> None:
    assert SMALL.padded_vocab_size == 128
    assert dataclasses.replace(SMALL, vocab_size=128).padded_vocab_size == 128
    assert dataclasses.replace(SMALL, vocab_size=129).padded_vocab_size == 256
