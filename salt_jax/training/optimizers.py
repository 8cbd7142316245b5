"""Optimizers: settings, the run's steps and its model in, an optax transformation out.

One of one's own needs no more than what `Optimizer` has (docs/extending.md).
"""

import abc
import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import optax
import optax.contrib

from salt_jax.errors import InputError
from salt_jax.models import decoder
from salt_jax.training import learning_rates


@runtime_checkable
class Optimizer(Protocol):
    """What updates the parameters."""

    @property
    def learning_rate(self) -> learning_rates.LearningRate:
        """The rate by step, which metrics show."""
        ...

    def make(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        """The transformation for a run of `steps` steps of a model, its vocab_size set."""
        ...


@dataclasses.dataclass(frozen=True)
class _ClippedOptimizer(abc.ABC):
    """What the optimizers here have in common; they differ by their `rule`.

    Attributes:
      learning_rate: The rate by step.
      weight_decay: Decoupled, times the learning rate, on matrices only (no norms, no biases).
      clip_norm: The gradient's global norm is clipped to this; 0 leaves it alone.
    """

    learning_rate: learning_rates.LearningRate
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise InputError(
                f"{type(self).__name__} got weight_decay {self.weight_decay} and clip_norm "
                f"{self.clip_norm}: neither can be negative."
            )

    def make(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        """The transformation for a run of `steps` steps of a model."""
        rule = self.rule(steps, model)
        if self.clip_norm == 0:
            return rule
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    @abc.abstractmethod
    def rule(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        """What happens to clipped gradients, weight decay and learning rate included."""


@dataclasses.dataclass(frozen=True)
class AdamW(_ClippedOptimizer):
    """AdamW (arXiv 1711.05101).

    Attributes:
      beta1: The decay of the first moment.
      beta2: The decay of the second moment.
      epsilon: Added to the root of the second moment.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def rule(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        del model
        return optax.adamw(
            self.learning_rate.schedule(steps),
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=is_matrix,
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(_ClippedOptimizer):
    """Adafactor (arXiv 1804.04235): factored second moments, updates clipped at 1, no momentum, the
    rate relative to a parameter's own RMS."""

    def rule(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        del model
        return optax.chain(
            optax.adafactor(learning_rate=None),
            optax.add_decayed_weights(-self.weight_decay, mask=is_matrix),
            # adafactor's own chain ends in a scale of -1, and so needs the positive rate.
            optax.scale_by_schedule(self.learning_rate.schedule(steps)),
        )


@dataclasses.dataclass(frozen=True)
class Muon(_ClippedOptimizer):
    """Muon (kellerjordan.github.io/posts/muon): orthogonalized momentum for the blocks' kernels, a
    layer at a time; Adam, as optax.contrib.muon has it, for embedding, head, norms and biases.

    Attributes:
      beta: The decay of the momentum.
      update_rms: The RMS of a kernel's update over the rate. 0.2 is about AdamW's, whose rates and
        weight decay then serve (arXiv 2502.16982); None scales by √max(1, outputs / inputs).
      adam_learning_rate: The rate of Adam; learning_rate if None. Weight decay is by learning_rate.
      beta1: Adam's decay of the first moment.
      beta2: Adam's decay of the second moment.
      epsilon: Added to the root of Adam's second moment, and to the momentum's norm.
    """

    beta: float = 0.95
    update_rms: float | None = 0.2
    adam_learning_rate: learning_rates.LearningRate | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def rule(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        rate = self.learning_rate.schedule(steps)
        muon = optax.contrib.muon(
            rate,
            beta=self.beta,
            eps=self.epsilon,
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            adam_learning_rate=(self.adam_learning_rate or self.learning_rate).schedule(steps),
            muon_weight_dimension_numbers=jax.tree.map(
                lambda axes: axes and optax.contrib.MuonDimensionNumbers(*axes),
                decoder.kernel_axes(model),
                is_leaf=lambda axes: axes is None or isinstance(axes, tuple),
            ),
            consistent_rms=self.update_rms,
        )
        # muon's own decay of what Adam updates would take norms and biases along.
        decay = optax.add_decayed_weights(lambda i: -self.weight_decay * rate(i), mask=is_matrix)
        return optax.chain(muon, decay)


def make_transformation(
    optimizer: Optimizer, steps: int, model: decoder.DecoderConfig
) -> optax.GradientTransformation:
    """The transformation of an optimizer of anyone's.

    Raises:
      InputError: It is no optimizer.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer.learning_rate, "schedule"):
        raise InputError(
            f"optimizer is {name}, which lacks make(steps, model), or a learning_rate with "
            "schedule(steps): set optimizer to one of optimizers/*.gin, or write it as "
            "docs/extending.md says."
        )
    made = optimizer.make(steps, model)
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(
            f"{name}.make gave {type(made).__name__}, expected an optax.GradientTransformation: "
            "change it, or set optimizer to one of optimizers/*.gin."
        )
    return made


def is_matrix(params: Any) -> Any:
    """True for kernels and embeddings. Norm scales and biases carry those names in the model."""

    def one(path: Any, _: Any) -> bool:
        return str(getattr(path[-1], "key", path[-1])) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(one, params)
