"""What a run costs: every step's metrics in; cumulative counters and lines of metrics out."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops

# The names of the losses' sums, where metrics.jsonl has another.
_NAMES = {"hard": "log_perplexity", "correct": "next_token_accuracy", "soft": "soft_loss"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of passing rows through a frozen model once: what scoring and evaluation cost.

    Attributes:
      flops: Model FLOPs, forward passes alone.
      tokens: Tokens read, with or without loss weight.
      seconds: Measured, compiling included.
    """

    flops: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, config: DecoderConfig, rows: int, length: int, seconds: float = 0.0) -> "Cost":
        """The cost of `rows` rows of `length` tokens."""
        tokens = rows * length
        return cls(tokens * flops.forward_flops_per_token(config, length), tokens, seconds)


@dataclasses.dataclass
class Counters:
    """What a run has cost so far, from its step 0 and over all restarts; part of every checkpoint.

    FLOPs are model FLOPs (`training/flops.py`), tokens those read, with or without loss weight.

    Attributes:
      student_flops: Forward and backward passes of the student.
      teacher_flops: Forward passes of the teacher, in stage 1.
      scoring_flops: Of the scores that the run's selection was made from, every row of the split,
        and of the pass that made its stored soft labels.
      evaluation_flops: Of evaluations on held-out rows.
      stage1_tokens, stage2_tokens: Trained on in each stage.
      scoring_tokens, evaluation_tokens: Scored and evaluated.
      stage1_seconds, stage2_seconds: Spent in the steps of each stage.
      scoring_seconds: As `salt score` measured it, on the machine that it ran on.
      evaluation_seconds: Spent in evaluations.
      compile_seconds: Spent in making the programs ready before the first step.
    """

    student_flops: float = 0.0
    teacher_flops: float = 0.0
    scoring_flops: float = 0.0
    evaluation_flops: float = 0.0
    stage1_tokens: int = 0
    stage2_tokens: int = 0
    scoring_tokens: int = 0
    evaluation_tokens: int = 0
    stage1_seconds: float = 0.0
    stage2_seconds: float = 0.0
    scoring_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    compile_seconds: float = 0.0

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], where: str) -> "Counters":
        """The counters that a checkpoint holds.

        Args:
          saved: What `dataclasses.asdict` gave.
          where: The checkpoint, for the error.

        Raises:
          InputError: Another version's counters.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if saved.keys() != expected:
            raise InputError(
                f"{where} was saved by another version of salt_jax: its counters are "
                f"{', '.join(sorted(saved)) or 'none'}, expected {', '.join(sorted(expected))}: "
                "finish the run with the version that began it, or choose another --output_dir."
            )
        return cls(**saved)

    @property
    def train_flops(self) -> float:
        """What "equal FLOPs" compares: student, teacher and scoring, but not evaluation."""
        return self.student_flops + self.teacher_flops + self.scoring_flops

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.stage1_tokens + self.stage2_tokens

    @property
    def seconds(self) -> float:
        """What "equal time" compares: steps and scoring, but neither evaluation nor compiling."""
        return self.stage1_seconds + self.stage2_seconds + self.scoring_seconds

    def to_json(self) -> dict[str, Any]:
        """The sums and their parts, as metrics.jsonl and summary.json hold them."""
        sums = {"train_flops": self.train_flops, "tokens": self.tokens, "seconds": self.seconds}
        return {**sums, **dataclasses.asdict(self)}


def known_cost(saved: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's model cost to train, as Counters.to_json has it.

    None where the counters are missing (a converted model) or another version's.
    """
    if saved.keys() != {field.name for field in dataclasses.fields(Counters)}:
        return None
    return Counters(**saved).to_json()


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


class Ledger:
    """Counts steps as their metrics arrive and sums them up over a window of steps.

    Args:
      step: What a step costs.
      evaluation: What an evaluation costs; its seconds are measured here.
      scoring: What was spent on the run's selection and soft labels before it began.
    """

    def __init__(self, step: StepCost, evaluation: Cost, scoring: Cost | None = None) -> None:
        scoring = scoring or Cost()
        self.counters = Counters(
            scoring_flops=scoring.flops,
            scoring_tokens=scoring.tokens,
            scoring_seconds=scoring.seconds,
        )
        self._step, self._evaluation = step, evaluation
        self._window: list[Mapping[str, Any]] = []
        self._window_seconds = 0.0
        self._window_flops = 0.0
        self._mark = time.perf_counter()

    def start_clock(self) -> None:
        """Seconds count from here: call it after anything that is not a step."""
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts what is made ready inside it."""
        start = time.perf_counter()
        yield
        self.counters.compile_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Counts the one evaluation inside it."""
        start = time.perf_counter()
        yield
        self.counters.evaluation_seconds += time.perf_counter() - start
        self.counters.evaluation_flops += self._evaluation.flops
        self.counters.evaluation_tokens += self._evaluation.tokens

    def add(self, metrics: Mapping[str, Any], stage: int) -> None:
        """Adds one finished step; `metrics` are numbers on the host."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        teacher_flops = self._step.teacher_flops if stage == 1 else 0.0
        self._window.append(metrics)
        self._window_seconds += seconds
        self._window_flops += self._step.student_flops + teacher_flops
        counters = self.counters
        counters.student_flops += self._step.student_flops
        counters.teacher_flops += teacher_flops
        if stage == 1:
            counters.stage1_tokens += self._step.tokens
            counters.stage1_seconds += seconds
        else:
            counters.stage2_tokens += self._step.tokens
            counters.stage2_seconds += seconds

    def close_window(self) -> dict[str, Any]:
        """A line of metrics: means over the steps since the last one, and the counters.

        Its MFU is the model FLOPs of student and teacher in these steps over what the devices could
        have done in their time; null where the devices' peak is not known.
        """
        last, steps, seconds = self._window[-1], len(self._window), self._window_seconds
        means = {
            _NAMES.get(name, name): _mean(self._window, name)
            for name in last
            if name not in ("skipped_updates", "weight")
        }
        peak = self._step.peak_flops
        record = {
            **means,
            "tokens_per_second": steps * self._step.tokens / seconds,
            "seconds_per_step": seconds / steps,
            "mfu": self._window_flops / seconds / peak if peak else None,
            **self.counters.to_json(),
            "skipped_updates": int(last["skipped_updates"]),
        }
        self._window, self._window_seconds, self._window_flops = [], 0.0, 0.0
        return record


def _mean(window: list[Mapping[str, Any]], name: str) -> float:
    """Over steps; a teacher's values weigh by the share of the step's loss that it was part of."""
    found = [metrics for metrics in window if name in metrics]
    values = [float(metrics[name]) for metrics in found]
    if name not in losses.TEACHER_VALUES:
        return float(np.mean(values))
    shares = [float(metrics.get("distilled", 1.0)) for metrics in found]
    return float(np.average(values, weights=shares)) if any(shares) else float("nan")
