"""Reading the packed cache: rows/s, and the first batch at step 1,000,000 over that at step 0.

Also rows/s of one thread, unchanged, with UL2's objectives, and with each objective alone.

    python benchmarks/reading.py
    python benchmarks/reading.py --rows 200000

Writes a cache of random rows of 1,280 tokens to a temporary folder and reads it as `salt train`
does. The bar is the rows that training consumes on one H200 at 1B parameters and 50% MFU, computed,
not measured: 989 TFLOP/s · 50% / FLOPs of a token / 1,280. A start opens the cache, makes the order
and reads the first batch, with a warm file cache for both sides.
"""

import argparse
import pathlib
import tempfile
import time
from typing import Any

import measurement
import numpy as np

from salt_jax.data import denoisers, features
from salt_jax.data.cache_shards import cache_shard, write_shard
from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.data.packed_cache import PackedCache, begin_cache, finish_cache
from salt_jax.data.row_order import RowOrder
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops

LENGTH, BATCH = 1280, 64
LATE_STEP = 1_000_000
SHARDS = 8
# 1.0B parameters with 32,000 ids.
STUDENT = DecoderConfig(
    embed_dim=2048, num_layers=18, num_heads=16, mlp_dim=5632, vocab_size=32_000, max_length=LENGTH
)


def write_cache(folder: pathlib.Path, rows: int, shards: int = 8) -> None:
    """Writes rows of random bytes, two documents each."""
    # 32,000 ids, so that a token takes two bytes as with a real vocabulary.
    vocabulary = ByteVocabulary(reserved=31_000)
    begin_cache(folder)
    form, written = RecordFormat(LENGTH, vocabulary.size), {}
    rng = np.random.default_rng(0)
    segments = np.where(np.arange(LENGTH) < LENGTH // 3, 1, 2)

    def row() -> features.Row:
        targets = rng.integers(3, 31_000, size=LENGTH).astype(np.int32)
        return features.make_row(targets, np.ones(LENGTH, np.float32), segments, 0)

    for shard in range(shards):
        file = cache_shard(folder, "train", shard, shards)
        own = (row() for _ in range(rows * shard // shards, rows * (shard + 1) // shards))
        counts = write_shard(file, own, form, ("text",), folder / "rows.tmp")
        written[f"train/{file.name}"] = counts
    finish_cache(folder, {"train": (written, {})}, vocabulary=vocabulary, sequence_length=LENGTH)


OBJECTIVES = {
    "as they are": None,
    "ul2": denoisers.Objectives(),
    "prefix alone": denoisers.Objectives(causal=0, span=0),
    "span alone": denoisers.Objectives(causal=0, prefix=0),
}


def start(folder: pathlib.Path, first_step: int) -> tuple[InputPipeline, Any, Any]:
    """The pipeline, its iterator and the first batch."""
    cache = PackedCache.open(folder)
    split = cache.split("train")
    order = RowOrder(None, len(split), seed=0)
    pipeline = InputPipeline({"cache": split}, BATCH, cache.start_id, order)
    batches = pipeline.batches(first_step, 2 * LATE_STEP)
    return pipeline, batches, next(batches)


def rows_per_second(folder: pathlib.Path, batches: int) -> float:
    """Rows/s of the iterator that training reads, after its start."""
    _, iterator, _ = start(folder, 0)
    begin = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * BATCH / (time.perf_counter() - begin)


def rows_per_second_of_a_thread(folder: pathlib.Path, batches: int) -> dict[str, list[float]]:
    """Rows/s by objective in this thread, without reading ahead; three alternating measurements."""
    cache = PackedCache.open(folder)
    split = cache.split("train")
    order = RowOrder(None, len(split), seed=0)
    found: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for _ in range(3):
        for name, objectives in OBJECTIVES.items():
            denoising = None
            if objectives is not None:
                denoising = denoisers.Denoising(objectives, cache.vocabulary, LENGTH, 0, "causal")
            pipeline = InputPipeline(
                {"cache": split}, BATCH, cache.start_id, order, denoising=denoising
            )
            begin = time.perf_counter()
            for step in range(batches):
                pipeline.batch(step)
            found[name].append(batches * BATCH / (time.perf_counter() - begin))
    return {name: sorted(values) for name, values in found.items()}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's results."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_cache(folder, flags.rows)
        sides = {
            "late": lambda: start(folder, LATE_STEP)[2]["targets"],
            "first": lambda: start(folder, 0)[2]["targets"],
        }
        starts = measurement.paired(sides, flags.rounds)
        read = sorted(rows_per_second(folder, 200) for _ in range(3))
        of_a_thread = rows_per_second_of_a_thread(folder, 100)
    eaten = 0.5 * 989e12 / flops.train_flops_per_token(STUDENT, LENGTH) / LENGTH
    return {
        "rows_per_second": read,
        "rows_per_second_of_a_thread": of_a_thread,
        "rows_per_second_eaten_by_1b_on_h200": eaten,
        "read_over_eaten": read[1] / eaten,
        "first_batch_at_step_1000000_over_step_0": starts,
    }


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the cache")
    flags = parser.parse_args()
    measurement.report("reading", {"settings": vars(flags), **measure(flags)})


if __name__ == "__main__":
    main()
