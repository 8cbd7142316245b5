"""Preparing text: tokens/s a core on 1 and 2 processes, and what the whole Pile would take.

    python benchmarks/prepare.py CORPUS
    python benchmarks/prepare.py CORPUS --vocabulary 32000.model --workers 1 8

CORPUS is a folder in the Pile's layout. Without --vocabulary a BPE of 4,096 is trained on it, which
is not timed. Both rounds of jobs are timed, including the start of processes, in wall time and in
CPU time, which other work on the machine hardly changes; the caches of all runs must be equal. The
estimate for the Pile (1,254 GiB of text as released) uses only the CPU time of the fewest
processes: it leaves out waiting for disks or machines.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import measurement

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import SentencePieceVocabulary, Vocabulary
from salt_jax.preparation.cache_building import Building
from salt_jax.preparation.corpora import text_corpus
from salt_jax.preparation.local_runner import Progress
from salt_jax.preparation.packing import Packing
from salt_jax.preparation.pile import pile_files
from salt_jax.preparation.runners import JobRunner
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary

PILE_TEXT_BYTES = 1254 * 2**30


def timed(
    folder: pathlib.Path, flags: argparse.Namespace, vocabulary: Vocabulary, workers: int
) -> tuple[dict[str, float], PackedCache]:
    """Seconds of each round of jobs and of all, CPU seconds; and the cache."""
    corpus = text_corpus(pile_files(flags.corpus))
    packing = Packing(flags.sequence_length, shards=flags.shards)
    building = Building(folder, corpus, vocabulary, packing)
    folder.mkdir(parents=True)
    seconds: dict[str, float] = {}

    class TimedRunner(JobRunner):
        def run(self, function: Callable[[Any], Progress], *rest: Any) -> None:
            start = time.perf_counter()
            super().run(function, *rest)
            seconds[function.__name__] = time.perf_counter() - start

    start, busy = time.perf_counter(), sum(os.times()[:4])
    building.begin()
    building.build(TimedRunner(workers=workers), lambda needed_bytes, purpose: None)
    seconds |= {"all": time.perf_counter() - start, "busy": sum(os.times()[:4]) - busy}
    return seconds, PackedCache.open(folder)


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's results."""
    if flags.vocabulary:
        vocabulary: Vocabulary = SentencePieceVocabulary(flags.vocabulary)
    else:
        texts = (document.text for document in pile_files(flags.corpus).documents("train"))
        vocabulary = TrainedVocabulary().train(texts)
    best: dict[int, dict[str, float]] = {}
    digests = set()
    with tempfile.TemporaryDirectory() as name:
        for number in range(flags.rounds):
            for workers in flags.workers:
                folder = pathlib.Path(name) / f"{number}-{workers}"
                seconds, cache = timed(folder, flags, vocabulary, workers)
                digests.add(cache.digest)
                best[workers] = min(best.get(workers, seconds), seconds, key=lambda s: s["all"])
        splits = cache.manifest["splits"].values()
    assert len(digests) == 1, "the number of workers changed the cache"
    tokens = sum(split["tokens"] for split in splits)
    text_bytes = sum(split["bytes"] for split in splits)
    busy = {workers: seconds["busy"] for workers, seconds in best.items()}
    least = busy[min(busy)]
    return {
        "tokens": tokens,
        "text_bytes": text_bytes,
        "vocabulary_size": vocabulary.size,
        "seconds_of_the_fastest_round": best,
        "tokens_per_second": {w: tokens / seconds["all"] for w, seconds in best.items()},
        "tokens_per_busy_second_of_a_core": {w: tokens / s for w, s in busy.items()},
        "text_bytes_per_busy_second_of_a_core": {w: text_bytes / s for w, s in busy.items()},
        "estimated_core_hours_of_the_pile": PILE_TEXT_BYTES / text_bytes * least / 3600,
        "estimated_tokens_of_the_pile": PILE_TEXT_BYTES / text_bytes * tokens,
    }


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=3)
    parser.add_argument("corpus", help="folder of train/*.jsonl.zst, val and test")
    parser.add_argument("--vocabulary", help="a SentencePiece .model")
    parser.add_argument("--sequence_length", type=int, default=1280)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    flags = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # progress
        results = measure(flags)
    measurement.report("prepare", {"settings": vars(flags), **results})


if __name__ == "__main__":
    main()
