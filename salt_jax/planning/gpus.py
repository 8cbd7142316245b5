"""NVIDIA GPUs to compile for on machines without one.

    h100:8         a node of eight H100 SXM
    h200:1         one H200 SXM
    h100:8*4       four nodes of eight

JAX's CUDA plugin compiles from a description of the GPU, without a driver or ptxas. Nothing is
autotuned then, and the choice of kernels for matrix products may change the peak by a GiB, so
`MARGIN_GIB` is subtracted from the memory that a program may use.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from salt_jax.errors import InputError

GPUS_OF_A_NODE = 8
NETWORK_BANDWIDTH = 50e9  # bytes/s that a GPU sends to other nodes: 400 Gb/s InfiniBand for each
MARGIN_GIB = 2.0
# Without this the plugin would not start, since CUDA's libraries are missing.
if not pathlib.Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
_CUDNN_VERSION = 91_000  # as in the description of a GPU below


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
      kind: JAX's name for it.
      memory_bytes: Memory as the driver reports it.
      memory_bandwidth: Bytes/s.
      link_bandwidth: NVLink in one direction, bytes/s.
    """

    kind: str
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float

    @property
    def hbm_gib(self) -> float:
        """GiB for a program, of the launchers' XLA_PYTHON_CLIENT_MEM_FRACTION, less the margin."""
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.92"
        try:
            return float(share) * self.memory_bytes / 2**30 - MARGIN_GIB
        except ValueError as error:
            raise InputError(
                f"XLA_PYTHON_CLIENT_MEM_FRACTION is {share!r} in the environment, expected a share "
                "of a GPU's memory such as 0.92: change it or unset it."
            ) from error

    def target(self) -> str:
        """XLA's description of it (GpuTargetConfigProto); XLA aborts if a field is missing."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32
              shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
              shared_memory_per_core: 233472 threads_per_core_limit: 2048
              core_count: 132 fpus_per_core: 128
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.memory_bandwidth:.0f} l2_cache_size: 52428800
              clock_rate_ghz: 1.98 device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: 9 }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 12 minor: 9 patch: 0 }}
            device_description_str: "{self.kind}"
        """


GPUS: Mapping[str, Gpu] = types.MappingProxyType(
    {
        "h100": Gpu("NVIDIA H100", 84_942_979_072, 3.35e12, 450e9),
        "h200": Gpu("NVIDIA H200", 151_397_597_184, 4.8e12, 450e9),
    }
)


def gpus(name: str, nodes: int, of_a_node: int) -> tuple[jax.Device, ...]:
    """Devices of `nodes` nodes with `of_a_node` GPUs each; `name` is one of GPUS.

    Raises:
      InputError: JAX's CUDA plugin is not installed.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise InputError(
            "Compiling for NVIDIA GPUs needs JAX's CUDA plugin, which is not installed: "
            "pip install 'salt_jax[plan_gpu]', or choose another --topology."
        )
    description = jax_topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x{nodes}x{of_a_node}",  # partitions, hosts, devices
        target_config=GPUS[name].target(),
    )
    devices: tuple[Any, ...] = tuple(description.devices)
    return devices


@contextlib.contextmanager
def cudnn_assumed(devices: tuple[jax.Device, ...]) -> Iterator[None]:
    """A context in which cuDNN's attention can be lowered without cuDNN and a GPU."""
    if devices[0].platform != "gpu" or devices[0] in jax.devices():
        yield
        return
    # JAX only asks for cuDNN's version, by a function that has no setting.
    module: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    asking = module.check_cudnn_version
    module.check_cudnn_version = lambda: _CUDNN_VERSION
    try:
        yield
    finally:
        module.check_cudnn_version = asking
