"""Meshes: their order of devices, and which rows of a batch each process reads."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.planning import topologies
from salt_jax.training.partitioning import MeshConfig, batch_divisor, batch_part

TPUS = (
    ("v5e:16x16", MeshConfig()),
    ("v5e:16x16", MeshConfig(data=2, tensor=2)),
    ("v5p:4x4x8", MeshConfig()),
    ("v5p:4x4x8", MeshConfig(fsdp=32, tensor=4)),
    ("v4:4x8x8", MeshConfig()),
    ("v5e:4x8*2", MeshConfig(slice=2)),
    ("v4:4x4x8*2", MeshConfig(slice=-1, fsdp=64, tensor=2)),
)


def hops(devices: np.ndarray) -> float:
    """The mean number of links between devices that follow each other in a list."""
    coords = np.array([device.coords for device in devices])
    sides = coords.max(axis=0) + 1
    steps = np.abs(np.diff(coords, axis=0))
    return float(np.minimum(steps, sides - steps).sum(axis=1).mean())  # a torus has no ends


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(slice=2, data=2, tensor=2)])
def test_cpus_keep_their_order(config: MeshConfig) -> None:
    assert config.make().devices.ravel().tolist() == jax.devices()


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("name", "config"), TPUS)
def test_neighbours_on_an_axis_are_neighbours_on_the_network(name: str, config: MeshConfig) -> None:
    topology = topologies.find(name)
    mesh = config.make(topology.devices)
    slices = mesh.devices.reshape(topology.slices, -1)
    for of_slice in slices:
        assert len({getattr(device, "slice_index", 0) for device in of_slice}) == 1
    first = mesh.devices[0].reshape(-1, mesh.shape["fsdp"], mesh.shape["tensor"])
    as_they_come = np.array(topology.devices[: slices.shape[1]], dtype=object).reshape(first.shape)
    assert hops(first[0, :, 0]) < hops(as_they_come[0, :, 0])


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("name", "config"), TPUS)
def test_processes_read_every_row_once(
    name: str, config: MeshConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devices of a process don't follow each other along fsdp."""
    mesh = config.make(topologies.find(name).devices)
    processes = {device.process_index for device in mesh.devices.flat}
    readers: dict[int, set[int]] = {}
    for process in processes:
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        part, parts = batch_part(mesh)
        places = [
            place
            for place, devices in enumerate(mesh.devices.reshape(batch_divisor(mesh), -1))
            if any(device.process_index == process for device in devices)
        ]
        assert len(places) * parts == batch_divisor(mesh)
        for place in places:
            assert readers.setdefault(place, {part}) == {part}
    assert len(readers) == batch_divisor(mesh)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("name", "config", "slices"),
    [("v5e:2x2*2", MeshConfig(), 2), ("v5e:2x4", MeshConfig(slice=2), 1)],
)
def test_parameters_are_not_spread_over_the_network_between_slices(
    name: str, config: MeshConfig, slices: int
) -> None:
    with pytest.raises(InputError, match=rf"{slices} TPU slices .*MeshConfig.slice={slices}"):
        config.make(topologies.find(name).devices)


INTERLEAVED = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from salt_jax.training import partitioning

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
order = np.array(jax.devices())[[3, 0, 2, 1]].reshape(1, 1, 4, 1)
mesh = Mesh(order, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
part, parts = partitioning.batch_part(mesh)
own = np.arange(8 * part // parts, 8 * (part + 1) // parts, dtype=np.int32)
batch = partitioning.to_device({"ids": own, "rows": np.stack([own, own], 1)}, mesh)
held = np.concatenate([shard.data for shard in batch["ids"].addressable_shards])
assert sorted(held) == own.tolist(), (held, own)
count = lambda batch: (jax.numpy.zeros(8, "int32").at[batch["ids"]].add(1), batch["rows"][:, 1])
with partitioning.partitioned(mesh):
    seen, rows = jax.jit(count, out_shardings=partitioning.replicated(mesh))(batch)
assert seen.tolist() == [1] * 8, seen
print(part, *np.asarray(rows))
"""


@pytest.mark.slow
def test_devices_of_processes_that_are_interleaved() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members = [
        subprocess.Popen(
            [sys.executable, "-c", INTERLEAVED, address, str(index)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    texts = [member.communicate(timeout=120)[0].splitlines()[-1].split() for member in members]
    # Process 1 holds the places 0 and 2, and so is the first; a device has two rows.
    assert texts == [["1", *"01452367"], ["0", *"01452367"]]
