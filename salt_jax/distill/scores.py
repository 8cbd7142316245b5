"""What is known of a row from one pass of the scorer: how hard it is, and how learnable.

    S(x) = median over { t : y_t is among the scorer's k most likely ids } of  -log P(y_t | y_<t)

in nats (arXiv 2410.18779, section on data selection). "Among the k most likely" means that fewer
than k ids have a strictly greater logit; `chunked_loss.target_ranks` counts them. Positions that
count: weight above 0, and not the row's first, which may have no context.

In: losses and ranks of a batch of rows. Out: S and the statistics it is compared with, for several
k at once, each a column by name. `ScoreConfig` says which of them is a row's score.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from salt_jax.errors import InputError

STATISTICS = ("median", "mean", "perplexity")
UNLEARNABLE = ("drop", "zero")

LOG_PERPLEXITY = "log_perplexity"


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a row's score is, among the columns that `salt score` made.

    Attributes:
        k: a token is learnable if its truth is among the scorer's k most likely ids; may be left
            open where the scores are of one k alone.
        statistic: "median": METHOD.md's S. "mean": the mean loss of learnable tokens. "perplexity":
            the mean loss of all tokens that count, in nats, learnable or not.
        unlearnable: for the median. "drop": it is over learnable tokens alone. "zero": over all
            that count, 0 for the others.
        min_learnable_fraction: a row with a smaller share of learnable tokens scores -inf: keeps a
            hash with three lucky tokens from winning.
    """

    k: int | None = None
    statistic: str = "median"
    unlearnable: str = "drop"
    min_learnable_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.k is not None:
            checked_ks(self.k)
        for name, value, choices in (
            ("statistic", self.statistic, STATISTICS),
            ("unlearnable", self.unlearnable, UNLEARNABLE),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; set it to one of {', '.join(choices)}.")
        if self.statistic != "median" and self.unlearnable != "drop":
            raise InputError(
                f"unlearnable is {self.unlearnable!r} and statistic {self.statistic!r}: it says "
                "what becomes of tokens in a median; leave it out, or set statistic to median."
            )
        if not 0.0 <= self.min_learnable_fraction <= 1.0:
            raise InputError(
                f"min_learnable_fraction is {self.min_learnable_fraction}; set it within [0, 1]."
            )

    def among(self, ks: Sequence[int]) -> "ScoreConfig":
        """The same with its k settled.

        Args:
            ks: what the scores hold.

        Raises:
            InputError: they hold several and k is open, or not this one.
        """
        held = ", ".join(map(str, ks))
        if self.k is None and len(ks) > 1:
            raise InputError(f"The scores are of k = {held}: add --k, one of these.")
        if self.k is not None and self.k not in ks:
            raise InputError(
                f"k is {self.k}, and the scores are of k = {held}: set k to one of these, or score "
                "the rows again with that one."
            )
        return self if self.k is not None else dataclasses.replace(self, k=ks[0])

    @property
    def column(self) -> str:
        """The column that holds it."""
        if self.statistic == "perplexity":
            return LOG_PERPLEXITY
        kind = f"median_{self.unlearnable}" if self.statistic == "median" else self.statistic
        return f"{kind}_k{self.k}"

    @property
    def learnable_column(self) -> str:
        """The column of the share of learnable tokens."""
        return f"learnable_k{self.k}"


def checked_ks(k: int | Sequence[int]) -> tuple[int, ...]:
    """One k or several, ascending, each once.

    Raises:
        InputError: none, or one that is not a whole number of at least 1.
    """
    ks = tuple(k) if isinstance(k, list | tuple) else (k,)
    for one in ks:
        if not isinstance(one, int) or isinstance(one, bool) or one < 1:
            raise InputError(f"k is {one!r}; set it to a whole number of at least 1.")
    if not ks:
        raise InputError("k is an empty list; set it to at least one whole number.")
    return tuple(sorted(set(ks)))


def column_names(ks: Sequence[int]) -> list[str]:
    """The columns of `row_statistics`, in its order."""
    kinds = ("median_drop", "median_zero", "mean", "learnable")
    return [LOG_PERPLEXITY, *(f"{kind}_k{k}" for k in ks for kind in kinds)]


def row_statistics(
    loss_BxL: jax.Array, greater_BxL: jax.Array, weights_BxL: jax.Array, ks: Sequence[int]
) -> jax.Array:
    """All statistics of each row, float32 [columns, B], in the order of `column_names`.

    Losses are in nats per token, higher is harder; the share of learnable tokens is one of those
    that count, 0 to 1.

    Args:
        loss_BxL: float32, -log P of the truth under the scorer, at least 0; anything where the
            weight is 0.
        greater_BxL: int, ids with a strictly greater logit than the truth's.
        weights_BxL: loss weights; above 0 counts.
        ks: see ScoreConfig.k; one or several.

    Returns:
        -inf for the median and mean of a row without a learnable token, and for the mean of all
        where none counts; NaN throughout for a row where the losses of the tokens that count
        have no finite sum: the scorer is broken there.
    """
    length = loss_BxL.shape[1]
    counts_BxL = (weights_BxL > 0) & (jnp.arange(length) > 0)[None]
    counts_B = jnp.sum(counts_BxL, axis=-1)
    # One sort serves every k: the tokens learnable for it, in this order, are in order too. Those
    # that don't count go last, with a rank that no k takes.
    key_BxL = jnp.where(counts_BxL, loss_BxL, jnp.inf)
    greater_BxL = jnp.where(counts_BxL, greater_BxL, jnp.iinfo(jnp.int32).max)
    ordered_BxL, greater_BxL = jax.lax.sort((key_BxL, greater_BxL), dimension=-1, num_keys=1)
    total_B = jnp.sum(jnp.where(counts_BxL, loss_BxL, 0.0), axis=-1)
    broken_B = ~jnp.isfinite(total_B)
    columns = [jnp.where(counts_B > 0, total_B / jnp.maximum(counts_B, 1), -jnp.inf)]
    for k in ks:
        learnable_BxL = greater_BxL < k
        learnable_B = jnp.sum(learnable_BxL, axis=-1)
        median_B = _ranked_median(ordered_BxL, learnable_BxL, learnable_B, 0 * counts_B)
        zero_B = _ranked_median(ordered_BxL, learnable_BxL, learnable_B, counts_B - learnable_B)
        sum_B = jnp.sum(jnp.where(learnable_BxL, ordered_BxL, 0.0), axis=-1)
        mean_B = sum_B / jnp.maximum(learnable_B, 1)
        columns += [
            jnp.where(learnable_B > 0, values_B, -jnp.inf)
            for values_B in (median_B, zero_B, mean_B)
        ]
        columns.append(learnable_B / jnp.maximum(counts_B, 1))
    return jnp.where(broken_B, jnp.nan, jnp.stack(columns))


def _ranked_median(
    ordered_BxL: jax.Array, mask_BxL: jax.Array, count_B: jax.Array, zeros_B: jax.Array
) -> jax.Array:
    """The median [B] of the values under the mask and of `zeros_B` zeros besides.

    Args:
        ordered_BxL: ascending, and at least 0 under the mask.
        mask_BxL: whose values count.
        count_B: how many.
        zeros_B: how many zeros besides, which go before them.

    Returns:
        The mean of the middle two where the count is even; anything where there is none.
    """
    up_to_BxL = jnp.cumsum(mask_BxL, axis=-1)

    def of_rank(rank_B: jax.Array) -> jax.Array:
        place_Bx1 = jnp.sum(up_to_BxL <= rank_B[:, None], axis=-1, keepdims=True)
        found_B = jnp.take_along_axis(ordered_BxL, place_Bx1, axis=-1, mode="clip")[:, 0]
        return jnp.where(rank_B < 0, 0.0, found_B)

    all_B = count_B + zeros_B
    return 0.5 * (of_rank((all_B - 1) // 2 - zeros_B) + of_rank(all_B // 2 - zeros_B))
