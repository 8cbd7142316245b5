"""What digests of a checkpoint cost: seconds a GB to make and to check, beside save and restore.

    python benchmarks/checkpoint_digests.py --gigabytes 1.5 --folder DISK

Saves and restores a state of float32 noise on a disk: parameters and two moments, in leaves of 64
MB. Before each restore the files are dropped from the page cache; the bytes that are then read from
the disk (/proc/self/io) over the checkpoint's say how often each is.
"""

import os
import pathlib
import shutil
import statistics
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement

from salt_jax.training import checkpointer
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.partitioning import MeshConfig
from salt_jax.training.train_state import TrainState

LEAF = (8, 2048, 1024)


def noise(gigabytes: float) -> TrainState:
    """A state of parameters and two moments."""
    leaves = round(gigabytes * 1e9 / 3 / (4 * LEAF[0] * LEAF[1] * LEAF[2]))
    keys = jax.random.split(jax.random.key(0), (3, leaves))
    make = jax.jit(lambda key: jax.random.normal(key, LEAF, jnp.float32))
    trees = [{f"leaf_{at}": make(key) for at, key in enumerate(part)} for part in keys]
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, trees[0], {"first": trees[1], "second": trees[2]}, step)


def forget(folder: pathlib.Path) -> None:
    """Drops files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """Bytes that this process has read from disks."""
    lines = dict(
        line.split(": ")
        for line in pathlib.Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    )
    return int(lines["read_bytes"])


def noting(name: str, seconds: list[float]) -> None:
    """Notes the seconds of each call that the checkpointer makes of a function."""
    function: Callable[..., Any] = getattr(checkpointer, name)

    def timed(*given: Any) -> Any:
        result: list[Any] = []
        seconds.append(measurement.seconds(lambda: result.append(function(*given))))
        return result[0]

    setattr(checkpointer, name, timed)


def main() -> None:
    parser = measurement.parser(__doc__, rounds=3)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the state")
    parser.add_argument(
        "--folder", default=None, help="the disk, by default that of temporary files"
    )
    flags = parser.parse_args()
    state = noise(flags.gigabytes)
    sharding = jax.sharding.NamedSharding(MeshConfig().make(), jax.sharding.PartitionSpec())
    state = jax.block_until_ready(jax.device_put(state, sharding))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    layout: Any = types.SimpleNamespace(abstract=abstract)
    made, checked, saves, restores, times_read = [], [], [], [], []
    noting("write_digests", made)
    noting("check_together", checked)
    folder = pathlib.Path(tempfile.mkdtemp(dir=flags.folder))
    size = 0
    ours = Checkpointer(folder, CheckpointConfig())
    try:
        for step in range(1, flags.rounds + 1):
            start = time.perf_counter()
            ours.save(step, state, {})
            ours.wait()
            saves.append(time.perf_counter() - start)
            there = folder / "checkpoints" / str(step)
            size = sum(path.stat().st_size for path in there.rglob("*"))
            forget(there)
            before, start = bytes_from_disk(), time.perf_counter()
            jax.block_until_ready(ours.restore(layout, step)[0])
            restores.append(time.perf_counter() - start)
            times_read.append((bytes_from_disk() - before) / size)
        ours.close()
    finally:
        shutil.rmtree(folder)
    gigabytes = size / 1e9
    median = statistics.median
    measurement.report(
        "checkpoint_digests",
        {
            "checkpoint_gigabytes": gigabytes,
            "save_seconds": saves,
            "of_which_digests": made,
            "restore_seconds": restores,
            "of_which_checking": checked,
            "times_each_byte_is_read_from_disk": times_read,
            "seconds_a_gigabyte": {
                "save": median(saves) / gigabytes,
                "make_digests": median(made) / gigabytes,
                "restore": median(restores) / gigabytes,
                "check_digests": median(checked) / gigabytes,
            },
        },
    )


if __name__ == "__main__":
    main()
