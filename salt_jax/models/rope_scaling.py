"""Scaled rotary frequencies, by which a model reads texts longer than those it first learned from.

As in transformers, whose `rope_type` is `kind`: "linear", "llama3", "yarn" (arXiv 2309.00071) and
"longrope" (arXiv 2402.13753), the latter for texts within the original context.
"""

import dataclasses
import math

import numpy as np

from salt_jax.errors import InputError

KINDS = ("linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model differ from theta^(-2i / rotary_dim).

    Attributes:
      kind: "linear" divides all by `factor`; "llama3" and "yarn" only low ones, with a ramp.
      factor: What the lowest frequencies are divided by; with "longrope", the ratio of contexts.
      original_length: The context before scaling, in tokens; for all but "linear".
      low_freq_factor: "llama3": wavelengths over original_length / this are divided by `factor`.
      high_freq_factor: "llama3": wavelengths under original_length / this stay.
      beta_fast: "yarn": frequencies with more turns than this in original_length stay.
      beta_slow: "yarn": frequencies with fewer turns than this are divided by `factor`.
      attention_factor: "yarn", "longrope": Multiplies cosines and sines; if None, it is
        0.1 · ln(factor) + 1 or √(1 + ln(factor) / ln(original_length)).
      truncate: "yarn": Whether the ramp's ends are rounded to whole dimensions.
      divisors: "longrope": What each frequency is divided by.
    """

    kind: str
    factor: float
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisors", tuple(self.divisors))  # a list in JSON
        if self.kind not in KINDS:
            raise InputError(f"RopeScaling.kind is {self.kind!r}; set it to one of {KINDS}.")
        if not 1.0 <= self.factor < math.inf:
            raise InputError(f"RopeScaling.factor is {self.factor}; set it to at least 1.")
        least = 2 if self.kind == "longrope" else 1
        if self.kind != "linear" and self.original_length < least:
            raise InputError(
                f"RopeScaling.original_length is {self.original_length}; set it to the tokens of "
                "the context before scaling."
            )
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"RopeScaling.low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; set both above 0 and the first below the second."
            )
        if not 0.0 < self.beta_slow <= self.beta_fast:
            raise InputError(
                f"RopeScaling.beta_slow is {self.beta_slow} and beta_fast {self.beta_fast}; set "
                "both above 0 and the first to at most the second."
            )
        if self.kind == "longrope":  # so that exports state it: readers differ in its default
            object.__setattr__(self, "attention_factor", self.amplitude)

    def require_dimensions(self, rotary_dim: int) -> None:
        """Refuses divisors that are not one for each of rotary_dim / 2 frequencies."""
        are_positive = all(0.0 < divisor < math.inf for divisor in self.divisors)
        if self.kind == "longrope" and (2 * len(self.divisors) != rotary_dim or not are_positive):
            raise InputError(
                f"RopeScaling.divisors are {self.divisors}; set one above 0 for each of "
                f"{rotary_dim // 2} frequencies."
            )

    def ratios(self, rotary_dim: int, theta: float) -> np.ndarray:
        """What each frequency is multiplied by, float32 [rotary_dim / 2]."""
        if self.kind == "longrope":
            return 1 / np.asarray(self.divisors, np.float32)
        share: np.ndarray | float = 0.0  # of the unscaled frequency
        index = np.arange(rotary_dim // 2)
        if self.kind == "llama3":
            turns = self.original_length * theta ** (-2 * index / rotary_dim) / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            share = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        elif self.kind == "yarn":
            low, high = (
                rotary_dim
                * math.log(self.original_length / (turns * 2 * math.pi))
                / (2 * math.log(theta))
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rotary_dim - 1)
            share = 1 - np.clip((index - low) / (high - low or 0.001), 0, 1)
        ratios = share + (1 - share) / self.factor
        return np.broadcast_to(np.float32(ratios), index.shape)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
