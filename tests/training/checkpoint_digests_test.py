"""Digests among several processes: each file is read once, and damage is said by all."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest

from salt_jax.storage.manifests import file_digest
from salt_jax.training.checkpoint_digests import check_together
from salt_jax.training.checkpoint_items import ITEMS

# One of two processes, which saves, restores, and restores again after the test has flipped a bit.
MEMBER = """
import json, pathlib, sys
from salt_jax.runtime import processes
address, index, folder = sys.argv[1:]
flags = {"coordinator_address": address, "process_count": "2", "process_index": index}
together = processes.join(flags)

import types
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from salt_jax.errors import InputError
from salt_jax.training import checkpoint_digests
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.train_state import TrainState

read, digest = [], checkpoint_digests.file_digest

def noted(path):
    read.append(str(path).partition("checkpoints/")[2].partition("/")[2])
    return digest(path)

def tell(what):
    print("TOLD", json.dumps(what), flush=True)
    read.clear()

checkpoint_digests.file_digest = noted
mesh = Mesh(jax.devices(), ("fsdp",))

def array(shape, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.jit(lambda: jnp.arange(shape[0] * shape[1]).reshape(shape), out_shardings=sharding)()

step = array((1, 1))
state = TrainState(step, {"a": array((8, 512), "fsdp")}, {"m": array((8, 512), "fsdp")}, step)
checkpointer = Checkpointer(pathlib.Path(folder), CheckpointConfig())
checkpointer.save(1, state, {"rows": 3})
checkpointer.wait()
tell(read)
as_type = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
abstract = jax.tree.map(as_type, state)
layout = types.SimpleNamespace(abstract=abstract)
checkpointer.restore(layout, 1)
tell(read)
sys.stdin.readline()
try:
    checkpointer.restore(layout, 1)
except InputError as error:
    tell(str(error))
"""


def told(member: "subprocess.Popen[str]") -> Any:
    assert member.stdout is not None
    lines = iter(member.stdout.readline, "")
    return json.loads(next(line for line in lines if line.startswith("TOLD"))[5:])


@pytest.mark.slow
def test_two_processes_divide_the_files_among_them(tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, address, str(index), str(tmp_path)],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        step = tmp_path / "checkpoints" / "1"
        first, second = (told(member) for member in members)
        assert second
        assert all("/ocdbt.process_1/" in name for name in second)
        assert not any("/ocdbt.process_1/" in name for name in first)
        digests = json.loads((step / "digests.json").read_text())
        assert digests == {name: file_digest(step / name) for name in digests}
        check_together(step, ITEMS)
        first, second = (told(member) for member in members)
        assert {*first} | {*second} >= digests.keys()
        assert not {*first} & {*second} & digests.keys()
        name = next(name for name in digests if "/params/" in f"/{name}" and "/d/" in name)
        content = bytearray((step / name).read_bytes())
        content[0] ^= 1
        (step / name).write_bytes(content)
        for member in members:
            assert member.stdin is not None
            print(file=member.stdin, flush=True)
        for member in members:
            assert f"checkpoints/1 is damaged ({name} is not what was written)" in told(member)
    finally:
        for member in members:
            member.kill()
            member.communicate()
