"""The score of a row: how well the scorer predicts its tokens in, how hard yet learnable it is out.

    S(x) = median over { t : y_t is among the scorer's k most likely ids } of  -log P(y_t | y_<t)

in nats (arXiv 2410.18779, section on data selection). "Among the k most likely" means that fewer
than k ids have a strictly greater logit; `chunked_loss.target_ranks` counts them. Positions that
count: weight above 0, and not the row's first, which may have no context.
"""

import dataclasses

import jax
import jax.numpy as jnp

from salt_jax.errors import InputError

UNLEARNABLE = ("drop", "zero")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a row's score is.

    Attributes:
        k: a token is learnable if its truth is among the scorer's k most likely ids.
        unlearnable: "drop": the median is over learnable tokens alone. "zero": over all that count,
            0 for the others.
        min_learnable_fraction: a row with a smaller share of learnable tokens scores -inf, as one
            with none always does: keeps a hash with three lucky tokens from winning.
    """

    k: int = 10
    unlearnable: str = "drop"
    min_learnable_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise InputError(
                f"ScoreConfig.k is {self.k!r}; set it to a whole number of at least 1."
            )
        if self.unlearnable not in UNLEARNABLE:
            raise InputError(
                f"ScoreConfig.unlearnable is {self.unlearnable!r}; "
                f"set it to one of {', '.join(UNLEARNABLE)}."
            )
        if not 0.0 <= self.min_learnable_fraction <= 1.0:
            raise InputError(
                f"ScoreConfig.min_learnable_fraction is {self.min_learnable_fraction}; "
                "set it within [0, 1]."
            )


def row_scores(
    loss_BxL: jax.Array, greater_BxL: jax.Array, weights_BxL: jax.Array, config: ScoreConfig
) -> jax.Array:
    """S of each row, float32 [B], in nats per token; higher is harder.

    Args:
        loss_BxL: float32, -log P of the truth under the scorer; anything where the weight is 0.
        greater_BxL: int, ids with a strictly greater logit than the truth's.
        weights_BxL: loss weights; above 0 counts.
        config: k and what becomes of other tokens.

    Returns:
        -inf for a row without a learnable token or with too small a share of them; NaN for one
        where a token that counts has a NaN as its loss: the scorer is broken there. Neither is ever
        selected.
    """
    length = loss_BxL.shape[1]
    counts_BxL = (weights_BxL > 0) & (jnp.arange(length) > 0)[None]
    learnable_BxL = counts_BxL & (greater_BxL < config.k)
    if config.unlearnable == "drop":
        score_B = masked_median(loss_BxL, learnable_BxL)
    else:
        score_B = masked_median(jnp.where(learnable_BxL, loss_BxL, 0.0), counts_BxL)

    learnable_B, counts_B = jnp.sum(learnable_BxL, axis=-1), jnp.sum(counts_BxL, axis=-1)
    enough_B = learnable_B / jnp.maximum(counts_B, 1) >= config.min_learnable_fraction
    score_B = jnp.where((learnable_B > 0) & enough_B, score_B, -jnp.inf)
    broken_B = jnp.any(counts_BxL & jnp.isnan(loss_BxL), axis=-1)
    return jnp.where(broken_B, jnp.nan, score_B)


def masked_median(values_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    """The median of the values under the mask, row by row: [B].

    Of an even number it is the mean of the middle two, of none +inf.
    """
    ordered_BxL = jnp.sort(jnp.where(mask_BxL, values_BxL, jnp.inf), axis=-1)
    count_Bx1 = jnp.sum(mask_BxL, axis=-1, keepdims=True)
    lower_Bx1 = jnp.take_along_axis(ordered_BxL, jnp.maximum(count_Bx1 - 1, 0) // 2, axis=-1)
    upper_Bx1 = jnp.take_along_axis(ordered_BxL, count_Bx1 // 2, axis=-1, mode="clip")
    return 0.5 * (lower_Bx1 + upper_Bx1)[:, 0]
