"""Schedules of ω, the weight of the teacher's term in the loss, by step.

Stage 1 is the steps before `distill_steps`; from then on ω is 0 and the teacher does not run. The
host computes ω once per step and passes it to the program as an argument.
"""

import dataclasses
from typing import Protocol

from salt_jax.errors import InputError


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


def _check_omega(schedule: object, omega: float) -> None:
    if isinstance(omega, bool) or not isinstance(omega, int | float) or not 0.0 <= omega <= 1.0:
        raise InputError(f"{type(schedule).__name__}.omega is {omega!r}; set it within [0, 1].")


def _check_steps(schedule: object, name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(
            f"{type(schedule).__name__}.{name} is {steps!r}; "
            "set it to a whole number of steps, 0 or more."
        )
