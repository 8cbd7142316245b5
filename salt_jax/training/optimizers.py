"""Optimizers and learning-rate schedules: a config in, an optax transformation out."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from salt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """A learning rate with linear warm-up.

    Attributes:
      peak: The rate at the end of the warm-up.
      warmup_steps: Steps from 0 to the peak.
      decay: "cosine" falls from the peak to `final` at the run's last step;
        "inverse_sqrt" is peak · √(warmup_steps / step) after the warm-up (Shazeer & Stern 2018);
        "constant" stays at the peak.
      final: Where the cosine ends.
    """

    peak: float
    warmup_steps: int = 0
    decay: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.final < 0 or self.warmup_steps < 0:
            raise InputError(
                f"LearningRate got peak {self.peak}, final {self.final} and warmup_steps "
                f"{self.warmup_steps}: the peak must be over 0, the others at least 0."
            )
        if self.decay not in ("cosine", "inverse_sqrt", "constant"):
            raise InputError(
                f"LearningRate.decay is {self.decay!r}: choose cosine, inverse_sqrt or constant."
            )

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate as a function of the step, for a run of `steps` steps."""
        if self.decay == "cosine":
            after = optax.cosine_decay_schedule(
                self.peak, max(steps - self.warmup_steps, 1), self.final / self.peak
            )
        elif self.decay == "inverse_sqrt":
            warmup = max(self.warmup_steps, 1)
            after = lambda i: self.peak * (warmup / (i + warmup)) ** 0.5  # noqa: E731
        else:
            after = optax.constant_schedule(self.peak)
        warm = optax.linear_schedule(0.0, self.peak, max(self.warmup_steps, 1))
        # Step 0 of a warm-up would have rate 0 and teach nothing, so it counts from 1.
        warm_from_1: Callable[[Any], Any] = lambda i: warm(i + 1)  # noqa: E731
        return optax.join_schedules([warm_from_1, after], [self.warmup_steps])


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What updates the parameters.

    Attributes:
      learning_rate: The rate's schedule.
      kind: "adamw" (Loshchilov & Hutter 2019) or "adafactor" (Shazeer & Stern 2018; factored second
        moments, updates clipped at 1, no momentum, the rate relative to a parameter's own RMS).
      beta1: AdamW's decay of the first moment.
      beta2: AdamW's decay of the second moment.
      epsilon: AdamW's ε.
      weight_decay: Decoupled, times the learning rate, on matrices only (no norms, no biases).
      clip_norm: The gradient's global norm is clipped to this; 0 leaves it alone.
    """

    learning_rate: LearningRate
    kind: Literal["adamw", "adafactor"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "adafactor"):
            raise InputError(f"OptimizerConfig.kind is {self.kind!r}: choose adamw or adafactor.")
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise InputError(
                f"OptimizerConfig got weight_decay {self.weight_decay} and clip_norm "
                f"{self.clip_norm}: neither can be negative."
            )

    def make(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a run of `steps` steps."""
        rate = self.learning_rate.schedule(steps)
        if self.kind == "adamw":
            optimizer = optax.adamw(
                rate,
                b1=self.beta1,
                b2=self.beta2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
                mask=_is_matrix,
            )
        else:
            optimizer = optax.chain(
                optax.adafactor(learning_rate=None),
                optax.add_decayed_weights(-self.weight_decay, mask=_is_matrix),
                # adafactor's own chain ends in a scale of -1, and so needs the positive rate.
                optax.scale_by_schedule(rate),
            )
        if self.clip_norm == 0:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)


def _is_matrix(params: Any) -> Any:
    """True for kernels and embeddings. Norm scales and biases carry those names in the model."""

    def one(path: Any, _: Any) -> bool:
        return str(getattr(path[-1], "key", path[-1])) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(one, params)
