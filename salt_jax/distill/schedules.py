"""Schedules of ω, the weight of the teacher's term in the loss, by step.

Stage 1 is the steps before `distill_steps`; from then on ω is 0 and the teacher does not run. The
host computes ω once per step and passes it to the program as an argument.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from salt_jax.errors import InputError, require_counts

SIGNALS = ("gap", "cosine")


class Schedule(Protocol):
    """ω by step; your own may be any object with these methods."""

    def omega_at(self, step: int) -> float:
        """ω for the update that follows `step` completed steps, within [0, 1]."""
        ...

    def distill_steps(self, total_steps: int) -> int:
        """The number of steps, of total_steps, with a teacher: ω is 0 from this step on."""
        ...


@dataclasses.dataclass(frozen=True)
class NoDistillation:
    """ω = 0: plain training, the baseline."""

    def omega_at(self, step: int) -> float:
        del step
        return 0.0

    def distill_steps(self, total_steps: int) -> int:
        del total_steps
        return 0


@dataclasses.dataclass(frozen=True)
class Constant:
    """ω at every step: the SLM teaches to the end (RKD, "reverse KD")."""

    omega: float

    def __post_init__(self) -> None:
        _check_omega(self, self.omega)

    def omega_at(self, step: int) -> float:
        del step
        return self.omega

    def distill_steps(self, total_steps: int) -> int:
        return total_steps if self.omega > 0.0 else 0


@dataclasses.dataclass(frozen=True)
class Step:
    """ω for the first n_kd steps, then 0: SALT."""

    omega: float
    n_kd: int

    def __post_init__(self) -> None:
        _check_omega(self, self.omega)
        _check_steps(self, "n_kd", self.n_kd)

    def omega_at(self, step: int) -> float:
        return self.omega if step < self.n_kd else 0.0

    def distill_steps(self, total_steps: int) -> int:
        return min(self.n_kd, total_steps) if self.omega > 0.0 else 0


@dataclasses.dataclass(frozen=True)
class LinearDecay(Step):
    """ω until step `start`, then ω · (n_kd - step) / (n_kd - start), down to 0 at n_kd."""

    start: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self, "start", self.start)
        if self.start > self.n_kd:
            raise InputError(
                f"LinearDecay.start is {self.start}, after n_kd {self.n_kd}; "
                "set start to at most n_kd."
            )

    def omega_at(self, step: int) -> float:
        if not self.start <= step < self.n_kd:
            return super().omega_at(step)
        return self.omega * (self.n_kd - step) / (self.n_kd - self.start)


@dataclasses.dataclass(frozen=True)
class LinearRatioDecay(Step):
    """ω / (1 - ω), the teacher's weight over the truth's, falls linearly from step 0 to 0 at n_kd.

    ω must be below 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.omega == 1.0:
            raise InputError(
                "LinearRatioDecay.omega is 1, where ω / (1 - ω) is infinite; set omega below 1."
            )

    def omega_at(self, step: int) -> float:
        if step >= self.n_kd:
            return 0.0
        ratio = self.omega / (1.0 - self.omega) * (1.0 - step / self.n_kd)
        return ratio / (1.0 + ratio)


class Watched(NamedTuple):
    """What `Adaptive` has seen of a run's stage 1, and its decision; saved in checkpoints.

    Attributes:
      mean: The running mean of the signal.
      below: How many of the last steps in a row it was below the margin.
      n_kd: The step where ω becomes 0; None if that is undecided.
    """

    mean: float = 0.0
    below: int = 0
    n_kd: int | None = None


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """ω until the student gains no more from the teacher, then 0 (a hypothesis of ours).

    The running mean of a signal of stage 1's own steps is a mean of all steps, and after the first
    `window` steps an exponential one with the rate 1 / window. Once it has been below `margin` for
    `patience` steps in a row, ω becomes 0 after one more step, but not before `least` steps.

    Attributes:
      omega: ω.
      most: The most steps of stage 1, whatever the signal is.
      least: The fewest.
      signal: "gap" is the student's hard loss minus the teacher's, nats; "cosine" that of the two
        gradients in the logits, p - q and p - onehot(y), averaged over tokens.
      margin: In the signal's unit.
      window, patience: In steps.
    """

    omega: float
    most: int | None = None
    least: int = 0
    signal: str = "gap"
    margin: float = 0.0
    window: int = 100
    patience: int = 20

    def __post_init__(self) -> None:
        _check_omega(self, self.omega)
        if self.most is None:
            raise InputError(
                "Adaptive.most is None, and the rule may never end stage 1: set it to the most "
                "steps that the teacher may run."
            )
        _check_steps(self, "most", self.most)
        _check_steps(self, "least", self.least)
        require_counts(**{"Adaptive.window": self.window, "Adaptive.patience": self.patience})
        if self.signal not in SIGNALS:
            raise InputError(
                f"Adaptive.signal is {self.signal!r}; set it to one of {', '.join(SIGNALS)}."
            )
        if self.least > self.most:
            raise InputError(
                f"Adaptive.least is {self.least}, more than most, {self.most}; lower it."
            )

    def omega_at(self, step: int) -> float:
        return self.omega if step < (self.most or 0) else 0.0

    def distill_steps(self, total_steps: int) -> int:
        return min(self.most or 0, total_steps) if self.omega > 0.0 else 0

    def after(self, seen: Watched, done: int, metrics: Mapping[str, Any]) -> Watched:
        """What has been seen after the metrics of `done` completed steps of stage 1.

        The decision takes effect a step later, since that step runs while these metrics arrive.
        """
        if self.signal == "gap":
            value = float(metrics["hard"]) - float(metrics["teacher_hard"])
        else:
            value = float(metrics["gradient_cosine"])
        if seen.n_kd is not None or not math.isfinite(value):
            return seen
        mean = seen.mean + (value - seen.mean) / min(done, self.window)
        below = seen.below + 1 if mean < self.margin else 0
        ends = below >= self.patience and done + 1 >= self.least
        return Watched(mean, below, done + 1 if ends else None)


def _check_omega(schedule: object, omega: float) -> None:
    if isinstance(omega, bool) or not isinstance(omega, int | float) or not 0.0 <= omega <= 1.0:
        raise InputError(f"{type(schedule).__name__}.omega is {omega!r}; set it within [0, 1].")


def _check_steps(schedule: object, name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(
            f"{type(schedule).__name__}.{name} is {steps!r}; "
            "set it to a whole number of steps, 0 or more."
        )
