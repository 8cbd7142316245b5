"""Names of slices: what they give, and what is said of wrong ones."""

import importlib.util

import jax
import pytest

from salt_jax.errors import InputError
from salt_jax.planning import topologies
from salt_jax.planning.gpus import GPUS
from salt_jax.training.flops import device_peak_flops


def test_local_is_the_devices_at_hand() -> None:
    topology = topologies.find("local")
    assert topology.devices == tuple(jax.devices())
    assert topology.chip.kind == jax.devices()[0].device_kind
    assert topology.chip.peak_flops == device_peak_flops(topology.chip.kind)
    assert topologies.find("local", hbm_gib=3.0).chip.hbm_gib == 3.0


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("name", "chips", "kind", "hbm_gib", "peak", "slices"),
    [
        ("v5e:4x4", 16, "TPU v5 lite", 15.75, 197e12, 1),
        ("v5e:16x16", 256, "TPU v5 lite", 15.75, 197e12, 1),
        ("v5e:4x4*2", 32, "TPU v5 lite", 15.75, 197e12, 2),
        ("v4:4x4x8", 128, "TPU v4", 30.75, 275e12, 1),
        ("v5p:2x2x1", 4, "TPU v5", 95.74, 459e12, 1),
        ("v6e:8x16", 128, "TPU v6 lite", 31.25, 918e12, 1),
    ],
)
def test_slices(name: str, chips: int, kind: str, hbm_gib: float, peak: float, slices: int) -> None:
    topology = topologies.find(name)
    assert len(topology.devices) == chips
    assert topology.chip.kind == kind
    assert topology.chip.hbm_gib == hbm_gib
    assert topology.chip.peak_flops == peak
    assert topology.slices == slices
    assert len({getattr(d, "slice_index", 0) for d in topology.devices}) == slices


@pytest.mark.parametrize(
    "name",
    [
        *("v9:2x2", "v5e", "v5e:16", "v5e:4x4x4", "v5e:32x32", "v4:4x4", "v4:4x4x8*0", "", "tpu"),
        *("h100", "h100:0", "h100:9", "h100:2x4", "h100:8*0", "a100:8"),
    ],
)
def test_unknown_ones_are_refused_with_the_known(name: str) -> None:
    with pytest.raises(InputError, match=r"v5e:2x2\|.*16x16.*change --topology"):
        topologies.find(name)


@pytest.mark.usefixtures("libtpu")
def test_what_libtpu_refuses_is_refused_with_the_known() -> None:
    with pytest.raises(InputError, match=r"libtpu knows no topology 'v5e:3x3'.*16x16"):
        topologies.find("v5e:3x3")


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match=r"pip install 'salt_jax\[plan\]'"):
        topologies.find("v5e:4x4")
    topologies.find("local")


@pytest.mark.usefixtures("cuda_plugin")
@pytest.mark.parametrize(
    ("name", "chips", "kind", "link"),
    [
        ("h100:8", 8, "NVIDIA H100", 450e9),
        ("h200:1", 1, "NVIDIA H200", 450e9),
        ("h100:8*4", 32, "NVIDIA H100", 50e9),
    ],
)
def test_gpus(name: str, chips: int, kind: str, link: float) -> None:
    topology = topologies.find(name)
    assert len(topology.devices) == chips
    assert {device.device_kind for device in topology.devices} == {kind}
    assert topology.chip.kind == kind
    assert topology.chip.peak_flops == 989e12
    assert topology.chip.link_bandwidth == link
    assert topology.slices is None


def test_without_the_cuda_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'salt_jax\[plan_gpu\]'"):
        topologies.find("h100:8")


def test_a_gpus_memory_is_what_jax_gives_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    gpu = GPUS["h100"]
    assert gpu.hbm_gib == 0.92 * gpu.memory_bytes / 2**30 - 2
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".8")
    assert gpu.hbm_gib == 0.8 * gpu.memory_bytes / 2**30 - 2
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(InputError, match="XLA_PYTHON_CLIENT_MEM_FRACTION is 'most'"):
        _ = gpu.hbm_gib
