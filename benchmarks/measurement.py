"""Shared by all benchmarks: timing sides alternately, and reporting one JSON object.

Absolute times on a shared machine mean little, so every benchmark measures both sides of its ratio
alternately and reports the medians, the ratio of each round and the median ratio.
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

# JAX's events for tracing a function, and for compiling a program or loading it from the cache.
_TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """An argument parser with --rounds, which most benchmarks have."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=formatter)
    made.add_argument("--rounds", type=int, default=rounds, help="measurements of each side")
    return made


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call, until its arrays are ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def rounds(sides: Mapping[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of each side, measured alternately `count` times after a warm-up call of each."""
    for run in sides.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, run in sides.items():
            times[name].append(seconds(run))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(first: list[float], last: list[float]) -> dict[str, Any]:
    """The ratio of each round, and their median."""
    each = [a / b for a, b in zip(first, last, strict=True)]
    return {"ratio": statistics.median(each), "each_round": each}


def paired(sides: Mapping[str, Callable[[], Any]], count: int) -> dict[str, Any]:
    """Two sides measured alternately: median seconds of each, and the first over the second."""
    times = rounds(sides, count)
    return {"seconds": medians(times), **ratio(*times.values())}


def report(name: str, results: Mapping[str, Any]) -> None:
    """Prints a benchmark's results as JSON, with command, date, hardware and versions."""
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
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


class CompilationCounter:
    """Counts tracing and compilation in all threads inside its context.

    Attributes:
      traced: Functions traced; a program may have several.
      compiled: Programs compiled or loaded from the persistent cache.
      seconds: Time spent on these.
    """

    def __init__(self) -> None:
        self.traced, self.compiled, self.seconds = 0, 0, 0.0

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event == _TRACE_EVENT:
            self.traced += 1
        elif event == _COMPILE_EVENT:
            self.compiled += 1
            self.seconds += duration_secs
