"""The name of a slice in; its devices, which need not exist, and what its chips can do, out.

    v5e:16x16      one slice of 16 × 16 chips of TPU v5e
    v4:4x4x8*2     two slices of 4 × 4 × 8 chips of TPU v4, joined by the data center's network
    local          the devices at hand

Programs are compiled for a slice by libtpu, which runs without any TPU: `pip install
salt_jax[plan]`.
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
from salt_jax.training.flops import device_peak_flops

LOCAL = "local"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device offers; None where nothing is published or the device is unknown.

    Attributes:
      kind: The device's kind, as JAX names it.
      hbm_gib: Main memory that a program may use, GiB.
      peak_flops: Dense bfloat16, FLOP/s.
      memory_bandwidth: Of the main memory, bytes/s.
      link_bandwidth: Bytes/s that a chip can send to its neighbours, all links together.
    """

    kind: str
    hbm_gib: float | None = None
    peak_flops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: As it was asked for.
      devices: They need not exist.
      chip: What each of them offers.
      slices: Slices of equal shape among them.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class _Family:
    """A generation of TPUs.

    Attributes:
      config: libtpu's name for how its chips are programmed: "megacore" makes one device of the two
        cores of a chip.
      largest: The longest sides of a slice.
      examples: Usual slices, the smallest first.
      device_kind: The key of its peak in training/flops.py.
      hbm_gib: What XLA lets a program have; the rest of the HBM is the system's.
      memory_bandwidth: Bytes/s.
      link_bandwidth: Bytes/s, one direction, all links: half of the "bidirectional" figure.
    """

    config: str
    largest: tuple[int, ...]
    examples: tuple[str, ...]
    device_kind: str
    hbm_gib: float
    memory_bandwidth: float
    link_bandwidth: float


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Bandwidths: docs.cloud.google.com/tpu/docs, the pages v4, v5p, v5e and v6e; for v4's links (six of
# 50 GB/s) arXiv 2304.01433. HBM: what libtpu's compiler says is available, of 32, 95, 16 and 32 GB.
_FAMILIES: Mapping[str, _Family] = types.MappingProxyType(
    {
        "v4": _Family("megacore", (16, 16, 16), _CUBES, "TPU v4", 30.75, 1.2e12, 300e9),
        "v5p": _Family("megacore", (16, 16, 24), _CUBES, "TPU v5p", 95.74, 2.765e12, 600e9),
        "v5e": _Family("default", (16, 16), _SQUARES, "TPU v5e", 15.75, 8.19e11, 200e9),
        "v6e": _Family("default", (16, 16), _SQUARES, "TPU v6e", 31.25, 1.638e12, 400e9),
    }
)

# Makers' data sheets: bytes/s of memory, and of NVLink in one direction.
_GPUS: Mapping[str, tuple[float, float]] = types.MappingProxyType(
    {
        "NVIDIA A100": (2.0e12, 300e9),
        "NVIDIA H100": (3.35e12, 450e9),
        "NVIDIA H200": (4.8e12, 450e9),
    }
)


def find(name: str, hbm_gib: float | None = None) -> Topology:
    """The topology of a name.

    Args:
      name: See the module's docstring.
      hbm_gib: Memory of each device, GiB, in place of what is known of it.

    Raises:
      InputError: An unknown topology, or libtpu is not installed.
    """
    topology = _local() if name == LOCAL else _slice(name)
    if hbm_gib is None:
        return topology
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hbm_gib=hbm_gib))


def known() -> str:
    """The topologies one can name, as text."""
    families = (f"{name}:{'|'.join(family.examples)}" for name, family in _FAMILIES.items())
    return f"{LOCAL}, {', '.join(families)}, each with *N for N slices"


def _local() -> Topology:
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    family = next((f for f in _FAMILIES.values() if kind == _jax_kind(f)), None)
    memory, link = next((v for n, v in _GPUS.items() if kind.startswith(n)), (None, None))
    if family:
        memory, link = family.memory_bandwidth, family.link_bandwidth
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    chip = Chip(kind, limit / GIB if limit else None, device_peak_flops(kind), memory, link)
    return Topology(LOCAL, devices, chip)


def _jax_kind(family: _Family) -> str:
    """What JAX calls a family's device: Google's names and JAX's differ."""
    return (
        family.device_kind.replace("v5p", "v5").replace("v5e", "v5 lite").replace("v6e", "v6 lite")
    )


def _slice(name: str) -> Topology:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", name)
    family = _FAMILIES.get(match[1]) if match else None
    if match is None or family is None:
        raise InputError(f"There is no topology {name!r}; known are {known()}: change --topology.")
    sides = sorted(int(side) for side in match[2].split("x"))
    if len(sides) != len(family.largest) or any(
        side > most for side, most in zip(sides, family.largest, strict=True)
    ):
        raise InputError(
            f"There is no topology {name!r}: a slice of {match[1]} has {len(family.largest)} sides "
            f"of at most {'x'.join(map(str, family.largest))}; known are {known()}: change "
            "--topology."
        )
    _require_libtpu()
    slices = int(match[3] or 1)
    try:
        description = jax_topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{match[1]}:{match[2]}",
            chip_config_name=family.config,
            num_slices=slices,
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"libtpu knows no topology {name!r} ({error}); known are {known()}: change --topology."
        ) from error
    devices: tuple[Any, ...] = tuple(description.devices)
    chip = Chip(
        devices[0].device_kind,
        family.hbm_gib,
        device_peak_flops(family.device_kind),
        family.memory_bandwidth,
        family.link_bandwidth,
    )
    return Topology(name, devices, chip, slices)


def _require_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(
            "Compiling for a TPU slice needs libtpu, which is not installed: "
            "pip install 'salt_jax[plan]', or choose --topology=local."
        )
    # Without a TPU (JAX sets the first then) libtpu has nothing to lock for this process alone.
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
