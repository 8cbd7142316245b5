"""The Pile's number of rows: the highest scores, exactly, in little memory."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROWS, M = 425_000_000, 73_728_000
BYTES = 8 * ROWS  # the scores, the ids selected, and room to spare
MOST_MEMORY = 4 << 30

# A process of its own, whose peak is its own: the kernel's count in /proc starts anew with a
# program, that of getrusage at pytest's peak. The scores are drawn again to check.
PROGRAM = r"""
import json, pathlib, re, sys
import numpy as np
from salt_jax.storage.block_copies import InputFolder
from salt_jax.storage.restartable_shards import FinishedShards, RestartableShards
from salt_jax.data.row_scores import Selection
from salt_jax.data.shard_columns import SUFFIX, Column, write_columns
from salt_jax.distill.selection import Candidates, TopRows

folder, rows, m = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dtype = np.dtype([("score", "<f4")])

def drawn(shard):
    # Of 2^24 values, so that some twenty rows have the score at the cut.
    scores_n = np.random.default_rng(shard.index).random(len(shard.rows), np.float32)
    scores_n[::1009] = -np.inf
    return scores_n

shards = RestartableShards(
    folder / "scores", rows=rows, shard_rows=1 << 24, suffix=SUFFIX, made_from={}
)
shards.begin()
all_shards = shards.unfinished()
for shard in all_shards:
    with shards.writing(shard) as file:
        write_columns(file, {"score": drawn(shard)}, dtype)
        file.finish({}, {})
shards.finish("row_scores")
manifest = json.loads((folder / "scores/manifest.json").read_text())
scored = InputFolder(folder / "scores")
column = Column(FinishedShards(scored, manifest, SUFFIX, "salt score"), dtype, "score")

choice = TopRows(m).select(Candidates(len(column), column))
chosen = Selection.write(
    folder / "selection", choice.blocks(), cache_digest="a", split="train", how={}, cut=choice.cut
)
peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]

ids_m, seen, all_ties_taken, ties = chosen.row_ids, 0, True, 0
assert len(ids_m) == choice.rows == m
for shard in all_shards:
    scores_n = drawn(shard)
    last = seen + int(np.searchsorted(ids_m[seen:], shard.rows.stop))
    chosen_n = np.zeros(len(scores_n), bool)
    chosen_n[ids_m[seen:last] - shard.rows.start] = True
    seen = last
    assert np.all(chosen_n[scores_n > choice.cut])
    assert not np.any(chosen_n[scores_n < choice.cut])
    for taken in chosen_n[scores_n == choice.cut]:
        assert all_ties_taken or not taken, "not the lowest ids"
        all_ties_taken, ties = bool(taken), ties + 1
assert seen == m
assert ties > 1
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_425_million_scores_in_4_gib(tmp_path: pathlib.Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < BYTES:
        pytest.skip(f"{free / 1e9:.0f} GB of disk are free, and this takes {BYTES / 1e9:.0f} GB")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(ROWS), str(M)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    assert result.returncode == 0, result.stderr
    peak_kilobytes = int(result.stdout)
    assert peak_kilobytes * 1024 < MOST_MEMORY, f"{peak_kilobytes / 2**20:.1f} GiB"
