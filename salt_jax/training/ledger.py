"""Cost counters of a run (FLOPs, tokens, seconds), and metrics averaged over steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from salt_jax.distill import losses
from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops

# Names in metrics.jsonl of the losses' sums, where they differ.
_NAMES = {"hard": "log_perplexity", "correct": "next_token_accuracy", "soft": "soft_loss"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of passing some rows through a model once.

    FLOPs are model FLOPs, tokens count with or without loss weight, seconds include compilation.
    """

    flops: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, config: DecoderConfig, rows: int, length: int, seconds: float = 0.0) -> "Cost":
        """The cost of a forward pass over `rows` rows of `length` tokens."""
        tokens = rows * length
        return cls(tokens * flops.forward_flops_per_token(config, length), tokens, seconds)

    @classmethod
    def of_training(cls, config: DecoderConfig, rows: int, length: int) -> "Cost":
        """The cost of a forward and a backward pass over `rows` rows of `length` tokens."""
        tokens = rows * length
        return cls(tokens * flops.train_flops_per_token(config, length), tokens)


@dataclasses.dataclass
class Counters:
    """The cost counters of a run since step 0, over all restarts; saved in every checkpoint.

    FLOPs are model FLOPs (`training/flops.py`); tokens count with or without loss weight.

    Attributes:
      student_flops: The student's forward and backward passes.
      teacher_flops: The teacher's forward passes in stage 1.
      scoring_flops: Scoring every row of the split for the run's selection, and the teacher's pass
        for its stored soft labels.
      evaluation_flops: Evaluations on held-out rows.
      stage1_tokens, stage2_tokens: Tokens trained on in each stage.
      scoring_tokens, evaluation_tokens: Tokens read by scoring and evaluation.
      stage1_seconds, stage2_seconds: Time of each stage's steps.
      scoring_seconds: As `salt score` measured them, on its own machine.
      evaluation_seconds: Time of evaluations.
      compile_seconds: Time to compile before the first step.
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
        """The counters of a checkpoint, which an error names as `where`.

        Raises:
          InputError: Another version of salt_jax saved the counters.
        """
        expected = cls.__dataclass_fields__.keys()
        if saved.keys() != expected:
            raise InputError(
                f"{where} was saved by another version of salt_jax: its counters are "
                f"{', '.join(sorted(saved)) or 'none'}, expected {', '.join(sorted(expected))}: "
                "finish the run with the version that began it, or choose another --output_dir."
            )
        return cls(**saved)

    @property
    def train_flops(self) -> float:
        """FLOPs that runs are compared by: student, teacher and scoring, but not evaluation."""
        return self.student_flops + self.teacher_flops + self.scoring_flops

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.stage1_tokens + self.stage2_tokens

    @property
    def seconds(self) -> float:
        """Seconds that runs are compared by: steps and scoring, not evaluation or compilation."""
        return self.stage1_seconds + self.stage2_seconds + self.scoring_seconds

    def to_json(self) -> dict[str, Any]:
        """The sums and their parts, for metrics.jsonl and summary.json."""
        sums = {"train_flops": self.train_flops, "tokens": self.tokens, "seconds": self.seconds}
        return {**sums, **dataclasses.asdict(self)}


def known_cost(saved: Mapping[str, Any]) -> dict[str, Any] | None:
    """`Counters.to_json` of a checkpoint's counters; None for none, or those of other versions."""
    if saved.keys() != Counters.__dataclass_fields__.keys():
        return None
    return Counters(**saved).to_json()


class Ledger:
    """Counts the cost of steps as their metrics arrive, and averages these over a window.

    Args:
      student: The student's cost in a step.
      teacher: The teacher's cost in a step of stage 1.
      evaluation: An evaluation's cost; its seconds are measured.
      scoring: The cost of the run's selection and soft labels.
      peak_flops: Peak of all devices together, FLOP/s; None if unknown.
    """

    def __init__(
        self,
        student: Cost,
        teacher: Cost,
        evaluation: Cost,
        scoring: Cost,
        peak_flops: float | None,
    ) -> None:
        self.counters = Counters(
            scoring_flops=scoring.flops,
            scoring_tokens=scoring.tokens,
            scoring_seconds=scoring.seconds,
        )
        self._student, self._teacher, self._evaluation = student, teacher, evaluation
        self._peak_flops = peak_flops
        self._window: list[Mapping[str, Any]] = []
        self._window_seconds = 0.0
        self._window_flops = 0.0
        self._mark = time.perf_counter()

    def start_clock(self) -> None:
        """Starts timing the next step; call it after anything that is not a step."""
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Times the compilation inside the context."""
        start = time.perf_counter()
        yield
        self.counters.compile_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Counts the one evaluation inside the context."""
        start = time.perf_counter()
        yield
        self.counters.evaluation_seconds += time.perf_counter() - start
        self.counters.evaluation_flops += self._evaluation.flops
        self.counters.evaluation_tokens += self._evaluation.tokens

    def add(self, metrics: Mapping[str, Any], stage: int) -> None:
        """Counts a finished step of a stage; its metrics are on the host."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        student_flops = self._student.flops
        teacher_flops = self._teacher.flops if stage == 1 else 0.0
        self._window.append(metrics)
        self._window_seconds += seconds
        self._window_flops += student_flops + teacher_flops
        counters = self.counters
        counters.student_flops += student_flops
        counters.teacher_flops += teacher_flops
        if stage == 1:
            counters.stage1_tokens += self._student.tokens
            counters.stage1_seconds += seconds
        else:
            counters.stage2_tokens += self._student.tokens
            counters.stage2_seconds += seconds

    def close_window(self) -> dict[str, Any]:
        """A record of metrics: means over the steps since the last record, and the counters.

        MFU is the model FLOPs of student and teacher over the peak of all devices, in these steps;
        None if the peak is unknown.
        """
        last, steps, seconds = self._window[-1], len(self._window), self._window_seconds
        means = {
            _NAMES.get(name, name): _mean(self._window, name)
            for name in last
            if name not in ("skipped_updates", "weight")
        }
        peak = self._peak_flops
        record = {
            **means,
            "tokens_per_second": steps * self._student.tokens / seconds,
            "seconds_per_step": seconds / steps,
            "mfu": self._window_flops / seconds / peak if peak else None,
            **self.counters.to_json(),
            "skipped_updates": int(last["skipped_updates"]),
        }
        self._window, self._window_seconds, self._window_flops = [], 0.0, 0.0
        return record


def _mean(window: list[Mapping[str, Any]], name: str) -> float:
    """The mean over steps; the teacher's metrics are weighted by the tokens it taught."""
    found = [metrics for metrics in window if name in metrics]
    values = [float(metrics[name]) for metrics in found]
    if name not in losses.TEACHER_VALUES:
        return float(np.mean(values))
    shares = [float(metrics.get("distilled", 1.0)) for metrics in found]
    return float(np.average(values, weights=shares)) if any(shares) else float("nan")
