"""cuDNN's and Splash's attention against the reference; which of them is chosen for what."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh

from salt_jax.errors import InputError
from salt_jax.models import attention as dispatch
from salt_jax.models import decoder, flash_attention, remat
from salt_jax.models.attention import attention, choose_backend, platform_in_context
from salt_jax.models.decoder import DecoderConfig
from salt_jax.models.flash_attention import cudnn_attention, splash_attention, splash_block
from salt_jax.models.reference_attention import PLAIN, ScoreOptions, reference_attention
from salt_jax.training.partitioning import MeshConfig, batch_sharding, partitioned

LENGTH = 384
# Segments that end within a block of 128, a padded row's end, and a row of padding alone.
SEGMENTS = np.zeros((4, LENGTH), np.int32)
SEGMENTS[0, :30], SEGMENTS[0, 30:300], SEGMENTS[0, 300:350] = 1, 2, 3
SEGMENTS[1] = 1
SEGMENTS[2, :128], SEGMENTS[2, 128:] = 1, 2

Attention = Callable[..., jax.Array]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks a row, so that some lie ahead of the diagonal, on it and behind it."""
    monkeypatch.setattr(flash_attention, "_LARGEST_BLOCK", 128)


def random_inputs(heads: int, kv_heads: int, width: int = 16, dtype: str = "float32") -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (heads, kv_heads, kv_heads)
    shapes = [(len(SEGMENTS), LENGTH, count, width) for count in counts]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def value_and_gradients(attend: Attention) -> Callable[..., Any]:
    """Of a sum in which every number of the mixture has a weight of its own, and the mixture."""

    def loss(inputs: Any, segments: jax.Array) -> Any:
        mixed = attend(*inputs, segments)
        weights = jax.random.normal(jax.random.key(1), mixed.shape)
        return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_equal_reference(attend: Attention, inputs: Any, atol: float = 2e-5) -> None:
    expected = value_and_gradients(reference_attention)(inputs, SEGMENTS)
    seen = value_and_gradients(attend)(inputs, SEGMENTS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(seen))
    (_, mixed), gradients = jax.tree.map(lambda x: np.asarray(x, np.float32), expected)
    (_, seen_mixed), seen_gradients = jax.tree.map(lambda x: np.asarray(x, np.float32), seen)
    np.testing.assert_allclose(seen_mixed, mixed, atol=atol)
    for one, other in zip(seen_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=10 * atol)


def interpreted(*arrays: jax.Array, options: ScoreOptions = PLAIN) -> jax.Array:
    return splash_attention(*arrays, options=options, interpret=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(2, 2, 16), (4, 2, 16), (3, 1, 16), (1, 1, 64), (2, 1, 80), (1, 1, 96), (1, 1, 128)],
)
def test_splash_equals_reference(heads: int, kv_heads: int, width: int) -> None:
    """Values and gradients, also with Pythia's heads of 64, 80 and 128 and with 96."""
    assert_equal_reference(interpreted, random_inputs(heads, kv_heads, width))


@pytest.mark.parametrize("options", [ScoreOptions(window=70), ScoreOptions(0.3, 0.7, 200)])
def test_splash_has_windows_soft_caps_and_scales(options: ScoreOptions) -> None:
    inputs = random_inputs(2, 1, 16)
    seen = splash_attention(*inputs, SEGMENTS, interpret=True, options=options)
    expected = reference_attention(*inputs, SEGMENTS, options=options)
    np.testing.assert_allclose(seen, expected, atol=2e-5)
    assert not np.allclose(seen, reference_attention(*inputs, SEGMENTS), atol=1e-2)


@pytest.mark.parametrize("options", [ScoreOptions(window=70), ScoreOptions(0.3, window=200)])
def test_cudnn_is_given_windows_and_scales(
    options: ScoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the products of XLA in place of its kernel, from the same arguments."""
    own = jax.nn.dot_product_attention
    by_xla = lambda *heads, implementation, **given: own(*heads, **given)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    inputs = [x[1:3] for x in random_inputs(2, 1, 16)]  # rows without padding
    seen = cudnn_attention(*inputs, SEGMENTS[1:3], options=options)
    expected = reference_attention(*inputs, SEGMENTS[1:3], options=options)
    np.testing.assert_allclose(seen, expected, atol=2e-5)


def test_cudnn_has_no_soft_cap() -> None:
    arguments = ("gpu", 1280, 128, jnp.dtype("bfloat16"))
    assert choose_backend("auto", *arguments, ScoreOptions(soft_cap=50.0)) == "xla"
    assert choose_backend("auto", *arguments, ScoreOptions(window=70)) == "cudnn"
    with pytest.raises(InputError, match="has no soft cap"):
        choose_backend("cudnn", *arguments, ScoreOptions(soft_cap=50.0))


@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [
        (MeshConfig(fsdp=4, tensor=2), 2),
        (MeshConfig(slice=2, data=2, fsdp=1, tensor=2), 4),
        (MeshConfig(fsdp=2, tensor=4), 2),  # two devices share a group of heads
        (MeshConfig(fsdp=4, tensor=2), 1),
    ],
)
def test_splash_on_a_mesh_equals_reference(mesh: MeshConfig, kv_heads: int) -> None:
    """Each device has its own rows and heads: nothing but shared groups' gradients is exchanged."""
    devices = mesh.make()
    inputs = jax.device_put(random_inputs(4, kv_heads), batch_sharding(devices))
    with partitioned(devices):
        assert_equal_reference(interpreted, inputs)
        mixed = jax.jit(interpreted)(*inputs, SEGMENTS)
    assert mixed.sharding.shard_shape(mixed.shape) == (
        len(SEGMENTS) // (8 // mesh.tensor),
        LENGTH,
        4 // mesh.tensor,
        16,
    )


def test_rows_and_heads_that_devices_do_not_divide_are_whole_on_each() -> None:
    mesh = MeshConfig(fsdp=2, tensor=4).make()
    inputs = [x[:3] for x in random_inputs(6, 3)]
    with partitioned(mesh):
        mixed = jax.jit(interpreted)(*inputs, SEGMENTS[:3])
    assert mixed.sharding.shard_shape(mixed.shape) == (3, LENGTH, 6, 16)
    np.testing.assert_allclose(mixed, reference_attention(*inputs, SEGMENTS[:3]), atol=2e-5)


def test_blocks_divide_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    blocks = {length: splash_block(length) for length in (128, 256, 1280, 1408, 2048, 8192)}
    assert blocks == {128: 128, 256: 256, 1280: 640, 1408: 128, 2048: 512, 8192: 512}


@pytest.mark.parametrize(
    ("platform", "length", "width", "dtype", "expected"),
    [
        ("cpu", 1280, 128, "bfloat16", "xla"),
        ("tpu", 1280, 128, "bfloat16", "splash"),
        ("tpu", 1280, 256, "float32", "splash"),
        ("tpu", 1280, 64, "bfloat16", "splash"),
        ("tpu", 2048, 80, "bfloat16", "splash"),
        ("tpu", 1300, 128, "bfloat16", "xla"),
        ("tpu", 1, 128, "bfloat16", "xla"),
        ("gpu", 1280, 128, "bfloat16", "cudnn"),
        ("gpu", 1300, 80, "bfloat16", "cudnn"),
        ("gpu", 1301, 128, "bfloat16", "xla"),
        ("gpu", 1280, 128, "float32", "xla"),
        ("gpu", 1280, 256, "bfloat16", "xla"),
        ("gpu", 1280, 4, "bfloat16", "xla"),
    ],
)
def test_auto_chooses_what_can_do_it(
    platform: str, length: int, width: int, dtype: str, expected: str
) -> None:
    assert choose_backend("auto", platform, length, width, jnp.dtype(dtype)) == expected
    assert choose_backend("xla", platform, length, width, jnp.dtype(dtype)) == "xla"
    if expected != "xla":
        assert choose_backend(expected, platform, length, width, jnp.dtype(dtype)) == expected


@pytest.mark.parametrize(
    ("backend", "platform", "length", "width", "dtype", "words"),
    [
        ("splash", "cpu", 1280, 128, "bfloat16", "needs a TPU and this program is for cpu"),
        ("splash", "tpu", 1300, 128, "bfloat16", "rows of 1300 tokens are not a multiple of 128"),
        ("cudnn", "tpu", 1280, 128, "bfloat16", "needs an NVIDIA GPU and this program is for tpu"),
        ("cudnn", "gpu", 1280, 128, "float32", "DecoderConfig.dtype is float32"),
        ("cudnn", "gpu", 1280, 256, "bfloat16", "heads of 256"),
        ("cudnn", "gpu", 1281, 128, "bfloat16", "rows of 1281 tokens"),
    ],
)
def test_a_named_backend_that_cannot_is_refused(
    backend: str, platform: str, length: int, width: int, dtype: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        choose_backend(backend, platform, length, width, jnp.dtype(dtype))
    assert f"DecoderConfig.attention_backend is '{backend}'" in str(refusal.value)


def test_the_model_refuses_what_it_cannot_do_here() -> None:
    config = DecoderConfig(8, 1, 2, 8, vocab_size=10, attention_backend="splash")
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    row = jnp.ones((1, 8), jnp.int32)
    batch = {"inputs": row, "segment_ids": row, "positions": row}
    with pytest.raises(InputError, match="needs a TPU"):
        decoder.hidden_states(config, params, batch)


@pytest.mark.parametrize(
    ("capability", "backend"),
    [("9.0", "cudnn"), ("8.0", "cudnn"), ("7.5", "xla"), ("gfx90a", "xla")],
)
def test_auto_leaves_old_and_other_gpus_alone(
    capability: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass
    class Gpu:
        compute_capability: str

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(capability)])
    assert choose_backend("auto", "gpu", 1280, 128, jnp.dtype("bfloat16")) == backend


def test_the_mesh_in_context_decides_and_not_this_machine() -> None:
    assert platform_in_context() == jax.default_backend()
    chip = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), abstract_device=chip)

    def seen() -> str:
        found = []
        jax.eval_shape(lambda: found.append(platform_in_context()))
        return found[0]

    with jax.sharding.use_abstract_mesh(mesh):
        assert seen() == "tpu"
    with partitioned(MeshConfig().make()):
        assert seen() == "cpu"


@pytest.fixture
def splash_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a TPU, with its kernel's steps as plain operations."""
    monkeypatch.setattr(dispatch, "platform_in_context", lambda: "tpu")
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "splash": interpreted})


MODEL = DecoderConfig(
    embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, vocab_size=50, head_dim=128
)


def model_gradients(config: DecoderConfig) -> Any:
    params = nn.unbox(decoder.init_params(config, jax.random.key(0)))
    inputs = jax.random.randint(jax.random.key(1), SEGMENTS.shape, 0, 50)
    batch = {"inputs": inputs, "segment_ids": SEGMENTS, "positions": jnp.zeros_like(inputs)}

    def loss(params: Any) -> jax.Array:
        # Of what is no padding: there the backends are free to differ.
        hidden_BxLxD = decoder.hidden_states(config, params, batch)
        return jnp.sum(jnp.where(SEGMENTS[..., None] > 0, jnp.sin(hidden_BxLxD), 0.0))

    return jax.value_and_grad(loss), params


@pytest.mark.parametrize("policy", ["none", *remat.POLICIES])
@pytest.mark.usefixtures("splash_everywhere")
def test_a_model_with_splash_equals_one_with_the_reference(policy: str) -> None:
    config = dataclasses.replace(MODEL, remat=policy)
    plain, params = model_gradients(dataclasses.replace(MODEL, attention_backend="xla"))
    expected, seen = jax.jit(plain)(params), jax.jit(model_gradients(config)[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), seen, expected)


@pytest.fixture
def cudnn_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers for cuDNN 9.10 on a machine that hasn't it."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91_000)


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4, tensor=2)])
@pytest.mark.usefixtures("cudnn_here")
def test_cudnn_is_called_for_gpus(mesh: MeshConfig | None) -> None:
    """Lowered, not run: forward and backward calls, on one device's rows and heads, with a mask."""
    inputs = random_inputs(4, 2, dtype="bfloat16")
    devices = mesh.make() if mesh else None
    with partitioned(devices) if devices else contextlib.nullcontext():
        traced = value_and_gradients(cudnn_attention).trace(inputs, SEGMENTS)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    names = [re.findall(r"@__cudnn\$(\w+)\(", call)[0] for call in calls]
    assert names == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    rows, heads, kv_heads = (1, 2, 1) if mesh else (4, 4, 2)
    assert f"{rows}x{LENGTH}x{heads}x16xbf16" in calls[0]
    assert f"{rows}x{LENGTH}x{kv_heads}x16xbf16" in calls[0]
    assert f"{rows}x1x{LENGTH}x{LENGTH}xbf16" in calls[0]
    assert all("CAUSAL" in call for call in calls)


@pytest.mark.parametrize(
    ("policy", "forward_calls"),
    [("minimal", 1), ("attention", 1), ("attention_output", 1), ("full", 2)],
)
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4, tensor=2)])
@pytest.mark.usefixtures("cudnn_here")
def test_cudnn_runs_forward_once_where_its_output_is_kept(
    policy: str, forward_calls: int, mesh: MeshConfig | None
) -> None:
    attend = jax.checkpoint(cudnn_attention, policy=remat.POLICIES[policy])
    with partitioned(mesh.make()) if mesh else contextlib.nullcontext():
        traced = value_and_gradients(attend).trace(random_inputs(4, 2, 16, "bfloat16"), SEGMENTS)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == forward_calls


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU and jax[cuda]")
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
def test_cudnn_equals_reference(heads: int, kv_heads: int) -> None:
    inputs = random_inputs(heads, kv_heads, 128, "bfloat16")
    assert_equal_reference(lambda *arrays: attention(*arrays, backend="cudnn"), inputs, atol=0.03)


COMPILE_FOR_TPU = """
import json, sys
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from salt_jax.models.decoder import DecoderConfig
from salt_jax.models import decoder
from salt_jax.training.partitioning import DEFAULT_RULES, MeshConfig, batch_sharding, partitioned
from salt_jax.training.train_state import abstract_sharded_params

settings = json.loads(sys.argv[1])
mesh_settings = settings.pop("mesh")
topology = topologies.get_topology_desc("v5e:2x2", "tpu", chip_config_name="default")
mesh = MeshConfig(**mesh_settings).make(topology.devices)
config = DecoderConfig(256, 2, 4, 512, vocab_size=512, **{"head_dim": 128, **settings})
params = abstract_sharded_params(config, mesh, DEFAULT_RULES)
row = jax.ShapeDtypeStruct((8, 1280), jnp.int32, sharding=batch_sharding(mesh))
batch = {"inputs": row, "segment_ids": row, "positions": row}

def step(params, batch):
    def loss(params):
        return jnp.sum(decoder.hidden_states(config, params, batch).astype(jnp.float32) ** 2)
    return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

with partitioned(mesh):
    compiled = jax.jit(step, donate_argnums=0).lower(params, batch).compile()
print(json.dumps({"kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"')}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)
@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({"remat": "full"}, 4),
        ({"remat": "full", "attention_backend": "xla"}, 0),
        ({"remat": "attention_output", "mesh": {"fsdp": 2, "tensor": 2}, "num_kv_heads": 1}, 3),
        ({"remat": "attention_output", "head_dim": 80}, 3),
    ],
)
def test_a_step_with_splash_compiles_for_a_tpu(settings: dict[str, Any], kernels: int) -> None:
    """From a CPU process, for a slice that isn't there: "auto" goes by the mesh's devices."""
    settings = {"mesh": {}, "dtype": "bfloat16", **settings}
    command = [sys.executable, "-c", COMPILE_FOR_TPU, json.dumps(settings)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == {"kernels": kernels}
