"""Topologies by name: devices to compile for, which need not exist, with their peaks and memory.

    v5e:16x16      one slice of 16 × 16 chips of TPU v5e
    v4:4x4x8*2     two slices of 4 × 4 × 8 chips of TPU v4, connected by the data-center network
    h100:8         a node of eight H100 GPUs
    h200:8*4       four nodes of eight H200 GPUs
    local          this machine's devices

Programs are compiled for a slice by libtpu, which runs without any TPU (`pip install
salt_jax[plan]`), and for GPUs by JAX's CUDA plugin (`planning/gpus.py`).
"""

import dataclasses
import importlib.util
import os
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from salt_jax.errors import InputError
from salt_jax.planning.gpus import GPUS, GPUS_OF_A_NODE, NETWORK_BANDWIDTH, gpus
from salt_jax.training.flops import device_peak_flops

LOCAL = "local"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory and bandwidths of a device; None if unpublished or unknown.

    Attributes:
      kind: JAX's name for the device.
      hbm_gib: Main memory that a program may use, GiB.
      memory_bandwidth: Bandwidth of the main memory, bytes/s.
      link_bandwidth: Bytes/s that a chip can send to its neighbours, all links in one direction.
      network_bandwidth: Bytes/s that a chip can send to other slices or nodes.
    """

    kind: str
    hbm_gib: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 peak, FLOP/s."""
        return device_peak_flops(self.kind)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: Its name in --topology.
      devices: The devices, which need not exist.
      chip: Their memory and bandwidths.
      slices: TPU slices, or GPU nodes, that a slower network connects.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip
    slices: int = 1


# Bandwidths: docs.cloud.google.com/tpu/docs, the pages v4, v5p, v5e and v6e (half of a
# "bidirectional" figure); for v4's links (six of 50 GB/s) arXiv 2304.01433. HBM: what libtpu's
# compiler says is available, of 32, 95, 16 and 32 GB. Between slices: a pod's data-center network
# over its 256 chips (v5e, v6e), and 200 Gb/s for a host of four chips (v4, v5p: our assumption).
_TPUS: Mapping[str, Chip] = types.MappingProxyType(
    {
        "v4": Chip("TPU v4", 30.75, 1.2e12, 300e9, 6.25e9),
        "v5p": Chip("TPU v5", 95.74, 2.765e12, 600e9, 6.25e9),
        "v5e": Chip("TPU v5 lite", 15.75, 8.19e11, 200e9, 3.125e9),
        "v6e": Chip("TPU v6 lite", 31.25, 1.638e12, 400e9, 12.5e9),
    }
)
_LOCAL_GPUS = (
    Chip("NVIDIA A100", None, 2.0e12, 300e9),
    *(Chip(gpu.kind, None, gpu.memory_bandwidth, gpu.link_bandwidth) for gpu in GPUS.values()),
)
# The longest sides of a slice, and common slices of as many sides.
_SIDES = {"v4": (16, 16, 16), "v5p": (16, 16, 24), "v5e": (16, 16), "v6e": (16, 16)}
_USUAL = {
    2: "2x2|2x4|4x4|4x8|8x8|8x16|16x16",
    3: "2x2x1|2x2x2|2x2x4|4x4x4|4x4x8|4x8x8|8x8x8|8x8x16",
}


def find(name: str, hbm_gib: float | None = None) -> Topology:
    """The topology of a name, as in the module's docstring.

    `hbm_gib` replaces the known memory of a device, GiB.

    Raises:
      InputError: An unknown topology, or its compiler is not installed.
    """
    if name == LOCAL:
        topology = _local()
    else:
        topology = _nodes(name) if name.partition(":")[0] in GPUS else _slice(name)
    if hbm_gib is None:
        return topology
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hbm_gib=hbm_gib))


def _known() -> str:
    """The known names, for error messages."""
    families = (f"{name}:{_USUAL[len(sides)]}" for name, sides in _SIDES.items())
    nodes = (f"{name}:1|2|4|8" for name in GPUS)
    return f"{LOCAL}, {', '.join((*families, *nodes))}, each with *N for N slices or nodes"


def _local() -> Topology:
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    known = [chip for chip in (*_TPUS.values(), *_LOCAL_GPUS) if kind.startswith(chip.kind)]
    chip = max(known, key=lambda chip: len(chip.kind)) if known else Chip(kind)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    chip = dataclasses.replace(chip, kind=kind, hbm_gib=limit / GIB if limit else None)
    return Topology(LOCAL, devices, chip)


def _nodes(name: str) -> Topology:
    match = re.fullmatch(r"(\w+):([1-9]\d*)(?:\*([1-9]\d*))?", name)
    of_a_node, nodes = (int(match[2]), int(match[3] or 1)) if match else (0, 0)
    if match is None or of_a_node > GPUS_OF_A_NODE:
        raise InputError(
            f"There is no topology {name!r}: a node has at most {GPUS_OF_A_NODE} GPUs; known are "
            f"{_known()}: change --topology."
        )
    gpu = GPUS[match[1]]
    chip = Chip(gpu.kind, gpu.hbm_gib, gpu.memory_bandwidth, gpu.link_bandwidth, NETWORK_BANDWIDTH)
    return Topology(name, gpus(match[1], nodes, of_a_node), chip, nodes)


def _slice(name: str) -> Topology:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", name)
    if match is None or match[1] not in _TPUS:
        raise InputError(f"There is no topology {name!r}; known are {_known()}: change --topology.")
    family, largest = match[1], _SIDES[match[1]]
    sides = sorted(int(side) for side in match[2].split("x"))
    if len(sides) != len(largest) or any(
        side > most for side, most in zip(sides, largest, strict=True)
    ):
        raise InputError(
            f"There is no topology {name!r}: a slice of {family} has {len(largest)} sides of at "
            f"most {'x'.join(map(str, largest))}; known are {_known()}: change --topology."
        )
    _require_libtpu()
    slices = int(match[3] or 1)
    try:
        description = jax_topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{family}:{match[2]}",
            # "megacore" makes the two cores of a chip one device.
            chip_config_name="megacore" if family in ("v4", "v5p") else "default",
            num_slices=slices,
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"libtpu knows no topology {name!r} ({error}); known are {_known()}: change --topology."
        ) from error
    devices: tuple[Any, ...] = tuple(description.devices)
    return Topology(name, devices, _TPUS[family], slices)


def _require_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(
            "Compiling for a TPU slice needs libtpu, which is not installed: "
            "pip install 'salt_jax[plan]', or choose --topology=local."
        )
    # Without a TPU (JAX then sets the first), several processes may use libtpu.
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
