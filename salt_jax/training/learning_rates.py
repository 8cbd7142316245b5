"""Learning-rate schedules. Your own needs only a method `schedule` (docs/extending.md)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
import optax

from salt_jax.errors import InputError


class LearningRate(Protocol):
    """An optimizer's learning rate."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate as a function of the step, a number or an array, for a run of `steps` steps."""
        ...


@dataclasses.dataclass(frozen=True)
class WarmupConstant:
    """Linear warm-up from 0 to `peak` in `warmup_steps`, then constant."""

    peak: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.peak <= 0 or min(dataclasses.astuple(self)) < 0:
            raise InputError(f"{self}: the peak must be over 0, the others at least 0.")

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate as a function of the step."""
        warm = optax.linear_schedule(0.0, self.peak, max(self.warmup_steps, 1))
        # The warm-up counts from 1, since a step of rate 0 would be wasted.
        warm_from_1: Callable[[Any], Any] = lambda i: warm(i + 1)  # noqa: E731
        return optax.join_schedules([warm_from_1, self._after(steps)], [self.warmup_steps])

    def _after(self, steps: int) -> optax.Schedule:
        """The rate as a function of the steps since the warm-up, for a run of `steps` steps."""
        del steps
        return optax.constant_schedule(self.peak)


@dataclasses.dataclass(frozen=True)
class WarmupCosine(WarmupConstant):
    """Linear warm-up to the peak, then half a cosine down to `final` at the run's last step."""

    final: float = 0.0

    def _after(self, steps: int) -> optax.Schedule:
        decay_steps = max(steps - self.warmup_steps, 1)
        return optax.cosine_decay_schedule(self.peak, decay_steps, self.final / self.peak)


@dataclasses.dataclass(frozen=True)
class WarmupInverseSqrt(WarmupConstant):
    """Linear warm-up to the peak, then peak · √(warmup_steps / step) (arXiv 1804.04235)."""

    def _after(self, steps: int) -> optax.Schedule:
        del steps
        warmup = max(self.warmup_steps, 1)
        return lambda i: self.peak * (warmup / (i + warmup)) ** 0.5


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(WarmupConstant):
    """WSD (arXiv 2404.06395): linear warm-up, the peak for most of the run, then a short decay.

    With x from 0 to 1 over the decay, the rate is peak - (peak - final) · x^power.

    Attributes:
      final: The rate at the run's last step.
      decay_fraction: The decay's share of the run's steps; a tenth in the paper.
      power: 1 decays linearly; 0.5 by 1 - √x, which did better in arXiv 2405.18392.
    """

    final: float = 0.0
    decay_fraction: float = 0.1
    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_fraction > 1 or self.power == 0:
            raise InputError(f"{self}: decay_fraction must be at most 1, and power over 0.")

    def _after(self, steps: int) -> optax.Schedule:
        start = max(steps - round(self.decay_fraction * steps), self.warmup_steps)

        def rate(i: Any) -> Any:
            x = jnp.clip((i + self.warmup_steps - start) / max(steps - start, 1), 0.0, 1.0)
            return self.peak - (self.peak - self.final) * x**self.power

        return rate
