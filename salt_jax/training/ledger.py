"""What a run costs: every step's metrics in; cumulative counters and lines of metrics out."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops

# The names of the losses' sums, where metrics.jsonl has another.
_NAMES = {"hard": "log_perplexity", "correct": "next_token_accuracy", "soft": "soft_loss"}


@dataclasses.dataclass
class Counters:
    """What a run has cost so far; part of every checkpoint.

    Attributes:
      seconds: Spent in steps; compiling, evaluation and checkpoints aside.
      train_flops: Model FLOPs of student and teacher (`training/flops.py`).
      tokens: Tokens read, with or without loss weight.
    """

    seconds: float = 0.0
    train_flops: float = 0.0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step costs.

    Attributes:
      tokens: B · L.
      student_flops: The student's forward and backward.
      teacher_flops: The teacher's forward, in stage 1.
      peak_flops: Of all devices together, FLOP/s; None where it is not known.
    """

    tokens: int
    student_flops: float
    teacher_flops: float
    peak_flops: float | None

    @classmethod
    def of(
        cls, rows: int, length: int, student: DecoderConfig, teacher: DecoderConfig | None
    ) -> "StepCost":
        """The cost of a step over `rows` rows of `length` tokens on all of jax's devices."""
        tokens = rows * length
        device_peak = flops.device_peak_flops(jax.devices()[0].device_kind)
        return cls(
            tokens=tokens,
            student_flops=tokens * flops.train_flops_per_token(student, length),
            teacher_flops=tokens * flops.forward_flops_per_token(teacher, length)
            if teacher
            else 0.0,
            peak_flops=device_peak * jax.device_count() if device_peak else None,
        )

    def flops(self, stage: int) -> float:
        """Model FLOPs of a step in a stage."""
        return self.student_flops + (self.teacher_flops if stage == 1 else 0.0)


class Ledger:
    """Counts steps as their metrics arrive and sums them up over a window of steps."""

    def __init__(self, cost: StepCost) -> None:
        self.counters = Counters()
        self._cost = cost
        self._window: list[Mapping[str, Any]] = []
        self._window_seconds = 0.0
        self._window_flops = 0.0
        self._mark = time.perf_counter()

    def start_clock(self) -> None:
        """Seconds count from here: call it after anything that is not a step."""
        self._mark = time.perf_counter()

    def add(self, metrics: Mapping[str, Any], stage: int) -> None:
        """Adds one finished step; `metrics` are numbers on the host."""
        now = time.perf_counter()
        self._window.append(metrics)
        self._window_seconds += now - self._mark
        self._window_flops += self._cost.flops(stage)
        self.counters.seconds += now - self._mark
        self.counters.train_flops += self._cost.flops(stage)
        self.counters.tokens += self._cost.tokens
        self._mark = now

    def close_window(self) -> dict[str, Any]:
        """A line of metrics: means over the steps since the last one, and the counters."""
        last, steps, seconds = self._window[-1], len(self._window), self._window_seconds
        means = {
            _NAMES.get(name, name): float(np.mean([m[name] for m in self._window if name in m]))
            for name in last
            if name not in ("skipped_updates", "weight")
        }
        peak = self._cost.peak_flops
        record = {
            **means,
            "tokens_per_second": steps * self._cost.tokens / seconds,
            "seconds_per_step": seconds / steps,
            "mfu": self._window_flops / seconds / peak if peak else None,
            **dataclasses.asdict(self.counters),
            "skipped_updates": int(last["skipped_updates"]),
        }
        self._window, self._window_seconds, self._window_flops = [], 0.0, 0.0
        return record
