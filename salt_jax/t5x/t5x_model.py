"""A T5X model class with SALT's loss, for stage 1 with soft labels in the batch.

T5X's own `train.py` runs it (gin/t5x, docs/t5x.md) on the batches of t5x/packed_rows.py. Nothing
else in salt_jax imports this file, since T5X is not a requirement.

A T5X model does not know the step, and its state is part of every checkpoint. So ω is constant, the
stages are two launches, and no teacher is loaded: stage 2 uses T5X's own class, which resumes from
stage 1's checkpoint. Both have the same parameters.
"""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from salt_jax.distill.losses import LossConfig, SoftLabels
from salt_jax.distill.token_losses import token_losses
from salt_jax.errors import InputError

try:
    from clu import metrics as clu_metrics
    from t5x import losses as t5x_losses
    from t5x import models
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"T5X needs the library {error.name}, which is not installed: docs/t5x.md says how, and "
        "that its gin files are for `python -m t5x.train`",
        name=error.name,
    ) from error

# The names in T5X of token_losses' metrics.
_METRICS = {
    "hard": "hard_loss_per_nonpadding_target_token",
    "soft": "soft_loss_per_nonpadding_target_token",
    "teacher_hard": "teacher_loss_per_nonpadding_target_token",
    "agreement": "teacher_agreement",
}


class SaltDecoderOnlyModel(models.DecoderOnlyModel):
    """T5X's decoder-only model, with SALT's loss for batches with soft labels.

    Weights, z-loss and the loss's divisor are T5X's: Σ w · ((1 − ω) · hard + ω · soft + z_loss ·
    log² Σ exp z), over `loss_normalizing_factor`, by T5X's default 1, so a sum. As in T5X's own
    loss, the softmax includes logits beyond the vocabulary. With ω = 0, or without soft labels, it
    is T5X's own loss.

    Args:
        args: T5X's module, vocabulary and optimizer_def.
        omega: ω, constant during the launch.
        loss: temperatures and divergence. `PackedRows.loss` has checked the labels' temperature;
            z_loss is set on the model, and chunk_tokens is unused.
        kwargs: T5X's own settings.

    Raises:
        InputError: ω is outside [0, 1], or settings are incompatible.
    """

    def __init__(
        self, *args: Any, omega: float = 2 / 3, loss: LossConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        loss = loss or LossConfig()
        if not isinstance(omega, numbers.Real) or not 0.0 <= omega <= 1.0:
            raise InputError(f"SaltDecoderOnlyModel.omega is {omega!r}; set it within [0, 1].")
        if self._label_smoothing:
            raise InputError(
                f"LABEL_SMOOTHING is {self._label_smoothing}, and soft labels take its place: set "
                "it to 0.0."
            )
        if loss.z_loss:
            raise InputError(
                f"LossConfig.z_loss is {loss.z_loss}, and in T5X the model has a setting for it: "
                "leave it at 0.0 and set Z_LOSS."
            )
        self._omega: float = float(omega)
        self._loss: LossConfig = loss

    def loss_fn(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """T5X's loss function of the parameters, the features of `packed_rows.py` (each with a
        leading dimension B) and a dropout key or None.

        Returns:
            (loss, clu metrics by name: T5X's, and per token the hard and soft loss, the teacher's
            loss, and how often both models agree on the most likely id). InputError if there are
            fewer logits than ids, or fewer labels than the loss needs.
        """
        if "soft_ids" not in batch:
            return super().loss_fn(params, batch, dropout_rng)
        logits_BxLxV = self._compute_logits(params, batch, dropout_rng)
        targets_BxL, ids = batch["decoder_target_tokens"], logits_BxLxV.shape[-1]
        needed = self.output_vocabulary.vocab_size
        if ids < needed:
            raise InputError(
                f"The network has {ids} logits and the vocabulary {needed} ids: set VOCAB_SIZE to "
                "at least that."
            )
        divisor, weights_BxL = t5x_losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        soft_labels = SoftLabels(
            batch["soft_ids"], batch["soft_log_q"], batch["soft_rest"], batch["soft_teacher_loss"]
        )
        token = token_losses(
            logits_BxLxV, None, targets_BxL, self._omega, self._loss, ids, soft_labels
        )
        token["z_loss"] = self._z_loss * jnp.square(jax.nn.logsumexp(logits_BxLxV, axis=-1))
        sums = {name: jnp.sum(weights_BxL * value_BxL) for name, value_BxL in token.items()}
        divisor = 1.0 if divisor is None else divisor
        z_loss = sums["z_loss"] / divisor
        loss = sums["loss"] / divisor + z_loss
        metrics = self._compute_metrics(
            logits=logits_BxLxV,
            targets=targets_BxL,
            mask=weights_BxL,
            loss=loss,
            z_loss=z_loss,
            segment_ids={"decoder": batch["decoder_segment_ids"]},
        )
        metrics |= {
            theirs: clu_metrics.Average(total=sums[ours], count=jnp.sum(weights_BxL))
            for ours, theirs in _METRICS.items()
        }
        return loss, metrics
