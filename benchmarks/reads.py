"""Reads of storage for rows of the packed cache, and the seconds that they take at a latency.

A stand-in for a bucket answers each request after `--milliseconds`. Counted are requests to open a
cache, and for batches in random order, whose first finds no copies on this machine.

    python benchmarks/reads.py
    python benchmarks/reads.py --shards 1024 --rows 20000
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import measurement
from reading import write_cache

from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import RowOrder

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from tests.bucket_emulator import BucketEmulator

URL = "gs://bucket/cache"


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's results."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, BucketEmulator() as bucket:
        os.environ |= {
            "STORAGE_EMULATOR_HOST": bucket.url,
            "SALT_LOCAL_COPIES": str(pathlib.Path(name) / "copies"),
        }
        folder = pathlib.Path(name) / "cache"
        write_cache(folder, flags.rows, flags.shards)
        for path in folder.rglob("*"):
            if path.is_file():
                bucket.store(f"bucket/cache/{path.relative_to(folder)}", path.read_bytes())
        count = bucket.count

        def late(kind: str) -> Any:
            time.sleep(flags.milliseconds / 1e3)
            return count(kind)

        bucket.count = late  # type: ignore[method-assign]

        def counted(what: str, run: Callable[[], Any]) -> Any:
            asked, start = bucket.asked.copy(), time.perf_counter()
            made = run()
            seconds = time.perf_counter() - start
            found[what] = {"seconds": seconds, "requests": dict(bucket.asked - asked)}
            return made

        cache = counted("open", lambda: PackedCache.open(URL))
        split = cache.split("train")
        pipeline = InputPipeline(
            {"cache": split}, flags.batch, cache.start_id, RowOrder(None, len(split), seed=0)
        )
        for step in range(flags.batches):
            counted(f"batch {step}", lambda step=step: pipeline.batch(step))
        counted("the last batch again", lambda: pipeline.batch(flags.batches - 1))
        command = [sys.executable, "-c", TRACED, str(folder), str(flags.batch)]
        found["calls of the kernel on a disk"] = system_calls(command)
    return found


# Opens a cache on disk, then reads a batch, and then another; a missing file tells the parts apart.
TRACED = """
import os, sys
from salt_jax.data.packed_cache import PackedCache
os.path.exists("/part/open")
split = PackedCache.open(sys.argv[1]).split("train")
os.path.exists("/part/first batch")
rows = int(sys.argv[2])
split.__getitems__(range(0, len(split), len(split) // rows)[:rows])
os.path.exists("/part/another batch of the same shards")
split.__getitems__(range(1, len(split), len(split) // rows)[:rows])
os.path.exists("/part/end")
"""


def system_calls(command: list[str]) -> dict[str, dict[str, int]]:
    """Looks (stat, readlink) and reads (read, pread64) of a program by its parts, as strace counts
    them."""
    if not shutil.which("strace"):
        return {}
    with tempfile.NamedTemporaryFile("r") as trace:
        kinds = "trace=%%stat,readlink,read,pread64"
        subprocess.run(["strace", "-f", "-e", kinds, "-o", trace.name, *command], check=True)
        found: dict[str, dict[str, int]] = {}
        part = ""
        for line in trace:
            if '"/part/' in line:
                part = line.partition('"/part/')[2].partition('"')[0]
            elif part and part != "end" and "resumed" not in line:
                kind = "reads" if re.match(r"\d+ +p?read(64)?\(", line) else "looks"
                counts = found.setdefault(part, {"looks": 0, "reads": 0})
                counts[kind] += 1
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the cache")
    parser.add_argument("--shards", type=int, default=8, help="shards of the cache")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches that are read")
    parser.add_argument("--milliseconds", type=float, default=100, help="latency of a request")
    flags = parser.parse_args()
    measurement.report("reads", {"settings": vars(flags), **measure(flags)})


if __name__ == "__main__":
    main()
