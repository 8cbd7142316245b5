"""The score of a row: the scorer's logits on it in, how hard yet learnable it is out.

    S(x) = median over { t : y_t is among the scorer's k most likely ids } of  -log P(y_t | y_<t)

in nats (arXiv 2410.18779, section on data selection). "Among the k most likely" means that fewer
than k ids have a strictly greater logit. Positions that count: weight above 0, and not the row's
first, which may have no context.
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
    logits_BxLxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    *,
    k: int,
    vocab_size: int,
    unlearnable: str = "drop",
    min_learnable_fraction: float = 0.0,
) -> jax.Array:
    """S of each row, float32 [B], in nats per token; higher is harder.

    Can be jitted, with the keywords static.

    Args:
        logits_BxLxV: the scorer's, compared and normalised in float32; ids from vocab_size on are
            padding.
        targets_BxL: int32, the truth; anything where the weight is 0.
        weights_BxL: loss weights; above 0 counts.
        k, unlearnable, min_learnable_fraction: see ScoreConfig.
        vocab_size: number of ids that mean something; k may not be greater (InputError).

    Returns:
        -inf for a row without a learnable token or with too small a share of them; NaN for one
        where a token that counts has a NaN among its logits: the scorer is broken there. Neither
        is ever selected.
    """
    config = ScoreConfig(k, unlearnable, min_learnable_fraction)
    if k > vocab_size:
        raise InputError(
            f"ScoreConfig.k is {k}, more than the vocabulary's {vocab_size} ids; "
            "set it to at most that."
        )
    length = logits_BxLxV.shape[1]
    counts_BxL = (weights_BxL > 0) & (jnp.arange(length) > 0)[None]
    logits_BxLxV = logits_BxLxV[..., :vocab_size].astype(jnp.float32)
    truth_BxLx1 = jnp.take_along_axis(
        logits_BxLxV, jnp.where(counts_BxL, targets_BxL, 0)[..., None], axis=-1
    )
    greater_BxL = jnp.sum(logits_BxLxV > truth_BxLx1, axis=-1)
    loss_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1) - truth_BxLx1[..., 0]

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
