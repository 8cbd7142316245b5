"""What all benchmarks share: paired timing of two sides in one run, and one JSON object as a result.

Absolute times on a shared machine mean little, so every benchmark measures both sides of its ratio
in turn, round by round, and reports the medians, the ratio of each round and their median.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """An argument parser with --rounds, which most benchmarks have."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=formatter)
    made.add_argument("--rounds", type=int, default=rounds, help="measurements of each side")
    return made


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call, its arrays ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def paired(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Measures the sides in turn, after one call of each to warm up.

    Returns:
      {"seconds": {side: median}, "ratio": median over the rounds of first side / last side,
      "ratios": of each round}.
    """
    for run in sides.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
    first, last = next(iter(times.values())), list(times.values())[-1]
    ratios = [a / b for a, b in zip(first, last, strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def report(name: str, results: Mapping[str, Any]) -> None:
    """Prints a benchmark's results as JSON, with where and how they were measured."""
    device = jax.devices()[0]
    record = {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{jax.device_count()} × {device.device_kind}, {_processor()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "results": results,
    }
    print(json.dumps(record, indent=1, default=float))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()
