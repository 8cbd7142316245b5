"""Selection among as many rows as the Pile has, and the audit: seconds and peak memory.

    python benchmarks/selection.py
    python benchmarks/selection.py --rows 10000000 --m 2000000

Synthetic columns are written as by `salt score` (22 bytes per row), and removed at the end. Columns
that are read again come from the file cache if they fit.
"""

import argparse
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import measurement
import numpy as np

from salt_jax.data.row_scores import SUBSET, TARGETS_HASH, RowScores, RowScoresWriter, Selection
from salt_jax.distill import audit, selection

SUBSETS = 22
FLOATS = ("median_drop_k10", "learnable_k10", "log_perplexity")


def write(folder: pathlib.Path, rows: int) -> RowScores:
    """Writes columns of synthetic rows."""
    writer = RowScoresWriter(
        folder,
        cache_digest="",
        split="train",
        rows=rows,
        scorer={},
        ks=(10,),
        columns=FLOATS,
        shard_rows=1 << 20,
    )
    writer.begin()
    for shard in writer.unfinished():
        rng, size = np.random.default_rng(shard.index), len(shard.rows)
        columns = {
            **{name: rng.random(size, np.float32) for name in FLOATS},
            SUBSET: rng.integers(SUBSETS, size=size, dtype=np.uint16),
            TARGETS_HASH: rng.integers(2**63, size=size, dtype=np.uint64),
        }
        writer.write(shard, columns, {"seconds": 0.0, "workers": 1})
    return writer.complete()


def measure(folder: pathlib.Path, rows: int, m: int) -> dict[str, Any]:
    """Seconds of each part, and the peak memory after it."""
    scores = write(folder / "scores", rows)
    facts = audit.RowFacts(
        subset_names=[str(index) for index in range(SUBSETS)],
        subsets=scores.column(SUBSET),
        scores=scores.scores(FLOATS[0], FLOATS[1]),
        losses=scores.column(FLOATS[2]),
        learnable=scores.column(FLOATS[1]),
        hashes=scores.column(TARGETS_HASH),
    )
    candidates = selection.Candidates(len(facts), facts.scores, facts.subsets, SUBSETS)

    def choose(rule: selection.SelectionRule) -> Selection:
        blocks = rule.select(candidates).blocks()
        settings: dict[str, Any] = {"cache_digest": "", "split": "train", "how": {}}
        return Selection.write(folder / "selection", blocks, **settings)

    row_ids_m = choose(selection.TopRows(m)).row_ids  # which also compares every shard's digest
    parts: dict[str, Callable[[], Any]] = {
        "top_rows": lambda: choose(selection.TopRows(m)),
        "top_rows_stratified": lambda: choose(selection.TopRows(m, stratified=True)),
        "random_rows": lambda: choose(selection.RandomRows(m)),
        "audit_by_subset": lambda: audit.by_subset(facts, row_ids_m),
        "audit_rows_to_show": lambda: audit.rows_to_show(facts, row_ids_m, by_score=True),
        "audit_overlap": lambda: audit.overlap(row_ids_m, row_ids_m, rows),
        "audit_duplicates": lambda: audit.duplicates(facts.hashes, row_ids_m),
    }
    results = {}
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        results[name] = {"seconds": seconds, "peak_gib_so_far": peak}
    return results


def main() -> None:
    """Measures and prints."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", type=int, default=425_000_000)
    parser.add_argument("--m", type=int, default=73_728_000, help="rows selected")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(pathlib.Path(folder), flags.rows, flags.m)
    measurement.report("selection", {"settings": vars(flags), **results})


if __name__ == "__main__":
    main()
