"""Optimizers as optax transformations. Your own needs the members of `Optimizer`
(docs/extending.md)."""

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
    """Settings that make the optax transformation of a run."""

    @property
    def learning_rate(self) -> learning_rates.LearningRate:
        """The learning rate, which is logged."""
        ...

    def make(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        """The transformation for a run of `steps` steps; the model's vocab_size is set."""
        ...


@dataclasses.dataclass(frozen=True)
class _ClippedOptimizer(abc.ABC):
    """Base of the optimizers here, which clips gradients before their `rule`.

    Attributes:
      learning_rate: The learning rate.
      weight_decay: Decoupled, times the learning rate, on matrices only (no norms, no biases).
      clip_norm: The global norm that gradients are clipped to; 0 doesn't clip.
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
        """The transformation for a run of `steps` steps."""
        rule = self.rule(steps, model)
        if self.clip_norm == 0:
            return rule
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    @abc.abstractmethod
    def rule(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        """The transformation of clipped gradients, weight decay and learning rate included."""


@dataclasses.dataclass(frozen=True)
class AdamW(_ClippedOptimizer):
    """AdamW (arXiv 1711.05101).

    Attributes:
      beta1, beta2: Decay of the first and the second moment.
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
    """Adafactor (arXiv 1804.04235): factored second moments, updates clipped at 1, no momentum, and
    a rate relative to the parameter's RMS."""

    def rule(self, steps: int, model: decoder.DecoderConfig) -> optax.GradientTransformation:
        del model
        return optax.chain(
            optax.adafactor(learning_rate=None),
            optax.add_decayed_weights(-self.weight_decay, mask=is_matrix),
            # optax.adafactor negates the update itself.
            optax.scale_by_schedule(self.learning_rate.schedule(steps)),
        )


@dataclasses.dataclass(frozen=True)
class Muon(_ClippedOptimizer):
    """Muon (kellerjordan.github.io/posts/muon): orthogonalized momentum for each layer's kernels,
    and optax.contrib.muon's Adam for embedding, head, norms and biases.

    Attributes:
      beta: Decay of the momentum.
      update_rms: RMS of a kernel's update over the rate. 0.2 is about AdamW's, so that AdamW's
        rates and weight decay fit (arXiv 2502.16982); None scales by √max(1, outputs / inputs).
      adam_learning_rate: Adam's rate; learning_rate if None. Weight decay is by learning_rate.
      beta1, beta2: Decay of Adam's first and second moment.
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
        # Muon's own weight decay would include norms and biases.
        decay = optax.add_decayed_weights(lambda i: -self.weight_decay * rate(i), mask=is_matrix)
        return optax.chain(muon, decay)


def make_transformation(
    optimizer: Optimizer, steps: int, model: decoder.DecoderConfig
) -> optax.GradientTransformation:
    """Calls an optimizer's `make`; InputError if the object is not an optimizer."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer.learning_rate, "schedule"):
        raise InputError(
            f"optimizer is {name}, which lacks make(steps, model), or a learning_rate with "
            "schedule(steps): set optimizer to one of optimizers/*.gin, or write it as in "
            "docs/extending.md."
        )
    made = optimizer.make(steps, model)
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(
            f"{name}.make returned {type(made).__name__}, expected an "
            "optax.GradientTransformation: change it, or set optimizer to one of optimizers/*.gin."
        )
    return made


def is_matrix(params: Any) -> Any:
    """A tree of True for kernels and embeddings, False for leaves named scale or bias."""

    def one(path: Any, _: Any) -> bool:
        return str(getattr(path[-1], "key", path[-1])) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(one, params)
