"""Scores of rows for `salt score`: one number per row, from a scorer's predictions of its tokens.

    S(x) = median over { t : y_t is among the scorer's k most likely ids } of  -log P(y_t | y_<t)

in nats (arXiv 2410.18779, section on data selection). "Among the k most likely" means that fewer
than k ids have a strictly greater logit; such a token is called learnable. A token counts if its
weight is above 0 and it isn't the row's first, which may have no context.

A score is an object with the name of its column and the token values that it needs. All scores of a
pass share those values, sorted by loss. `ScoreConfig` chooses the column that rows are selected by.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from salt_jax.errors import InputError

UNLEARNABLE = ("drop", "zero")

# Values of a token, computed by `chunked_loss.target_ranks`: -log P of the target, nats; number of
# ids with a greater logit; entropy of the scorer's distribution, nats.
LOSS, RANK, ENTROPY = TOKEN_VALUES = ("loss", "rank", "entropy")

LOG_PERPLEXITY = "log_perplexity"


@runtime_checkable
class Score(Protocol):
    """One number per row, computed from its tokens.

    Attributes:
      name: Its column's name; scores that differ in a setting have different names.
      needs: The TOKEN_VALUES that it reads.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Collection[str]: ...

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        """The score of each row, [B]; -inf for none. Runs inside a jitted program.

        Args:
          tokens: The values needed by name, [B, L] each. A row's tokens are sorted by ascending
            loss, those that count first; the others have loss and entropy 0 and a rank above any k.
          counts_BxL: Whether a token counts.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Median:
    """The median loss of learnable tokens: S of the module's formula.

    Attributes:
      k: A token is learnable if it is among the scorer's k most likely ids.
      unlearnable: "drop" the other tokens, or count them as "zero" in the median.
    """

    k: int
    unlearnable: str = "drop"

    needs: ClassVar[Collection[str]] = (LOSS, RANK)

    def __post_init__(self) -> None:
        checked_ks(self.k)
        _require_unlearnable(self.unlearnable)

    @property
    def name(self) -> str:
        return f"median_{self.unlearnable}_k{self.k}"

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        up_to_BxL = jnp.cumsum(tokens[RANK] < self.k, axis=-1)
        learnable_B = up_to_BxL[:, -1]
        zeros_B = jnp.sum(counts_BxL, axis=-1) - learnable_B
        zeros_B = zeros_B if self.unlearnable == "zero" else 0 * zeros_B

        def of_rank(rank_B: jax.Array) -> jax.Array:
            # No loss is below 0, so the zeros come first.
            place_Bx1 = jnp.sum(up_to_BxL <= (rank_B - zeros_B)[:, None], axis=-1, keepdims=True)
            loss_B = jnp.take_along_axis(tokens[LOSS], place_Bx1, axis=-1, mode="clip")[:, 0]
            return jnp.where(rank_B < zeros_B, 0.0, loss_B)

        all_B = learnable_B + zeros_B
        median_B = 0.5 * (of_rank((all_B - 1) // 2) + of_rank(all_B // 2))
        return jnp.where(learnable_B > 0, median_B, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of a value over a row's tokens.

    Attributes:
      k: Average learnable tokens alone, for this k; None averages all tokens that count.
      value: One of TOKEN_VALUES: "loss", "rank" or "entropy".
    """

    k: int | None = None
    value: str = LOSS

    def __post_init__(self) -> None:
        if self.k is not None:
            checked_ks(self.k)
        if self.value not in TOKEN_VALUES:
            raise InputError(
                f"Mean.value is {self.value!r}; set it to one of {', '.join(TOKEN_VALUES)}."
            )

    @property
    def name(self) -> str:
        if self.k is None:
            return LOG_PERPLEXITY if self.value == LOSS else self.value
        return f"{'mean' if self.value == LOSS else self.value}_k{self.k}"

    @property
    def needs(self) -> Collection[str]:
        return {self.value} if self.k is None else {self.value, RANK}

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        mask_BxL = counts_BxL if self.k is None else tokens[RANK] < self.k
        count_B = jnp.sum(mask_BxL, axis=-1)
        sum_B = jnp.sum(jnp.where(mask_BxL, tokens[self.value], 0.0), axis=-1)
        return jnp.where(count_B > 0, sum_B / jnp.maximum(count_B, 1), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TrimmedMean:
    """The mean loss of a row's learnable tokens without the lowest and the highest ones.

    Attributes:
      k: A token is learnable if it is among the scorer's k most likely ids.
      trim: The share to leave out at each end, rounded down to whole tokens: 0 gives the mean, and
        a share just below 0.5 the median.
    """

    k: int
    trim: float = 0.25

    needs: ClassVar[Collection[str]] = (LOSS, RANK)

    def __post_init__(self) -> None:
        checked_ks(self.k)
        if not 0.0 <= self.trim < 0.5:
            raise InputError(f"TrimmedMean.trim is {self.trim}; set it from 0 to below 0.5.")

    @property
    def name(self) -> str:
        return f"trimmed_mean_{self.trim:g}_k{self.k}"

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        learnable_BxL = tokens[RANK] < self.k
        place_BxL, learnable_B = jnp.cumsum(learnable_BxL, -1) - 1, jnp.sum(learnable_BxL, -1)
        left_out_Bx1 = jnp.floor(self.trim * learnable_B * (1.0 + 1e-6))[:, None]
        above_Bx1 = learnable_B[:, None] - left_out_Bx1
        kept_BxL = learnable_BxL & (place_BxL >= left_out_Bx1) & (place_BxL < above_Bx1)
        sum_B = jnp.sum(jnp.where(kept_BxL, tokens[LOSS], 0.0), axis=-1)
        kept_B = jnp.sum(kept_BxL, axis=-1)
        return jnp.where(learnable_B > 0, sum_B / jnp.maximum(kept_B, 1), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class LearnableFraction:
    """The share of learnable tokens among those that count."""

    k: int

    needs: ClassVar[Collection[str]] = (RANK,)

    def __post_init__(self) -> None:
        checked_ks(self.k)

    @property
    def name(self) -> str:
        return f"learnable_k{self.k}"

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        learnable_B = jnp.sum(tokens[RANK] < self.k, axis=-1)
        return learnable_B / jnp.maximum(jnp.sum(counts_BxL, axis=-1), 1)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """The column of `salt score` that rows are selected by.

    Attributes:
      k: The k of learnable tokens; may be left unset if the scores have only one k.
      statistic: "median": the paper's S. "mean": the mean loss of learnable tokens. "perplexity":
        the mean loss of all tokens that count, in nats. Or a column's name.
      unlearnable: "drop" or "zero"; see `Median`.
      min_learnable_fraction: Rows with a smaller share of learnable tokens score -inf, so that a
        row of noise with three lucky tokens is not selected.
    """

    k: int | None = None
    statistic: str = "median"
    unlearnable: str = "drop"
    min_learnable_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.k is not None:
            checked_ks(self.k)
        _require_unlearnable(self.unlearnable)
        if self.statistic != "median" and self.unlearnable != "drop":
            raise InputError(
                f"unlearnable is {self.unlearnable!r} and statistic {self.statistic!r}, but only a "
                "median has that setting; leave it out, or set statistic to median."
            )
        if not 0.0 <= self.min_learnable_fraction <= 1.0:
            raise InputError(
                f"min_learnable_fraction is {self.min_learnable_fraction}; set it within [0, 1]."
            )

    def among(self, ks: Sequence[int], columns: Collection[str]) -> "ScoreConfig":
        """This config for scores of these ks and columns, with k filled in if it is unset.

        Raises:
          InputError: k is unset and the scores have several, or not this one; or no such column.
        """
        held = ", ".join(map(str, ks))
        if self.k is None and len(ks) > 1:
            raise InputError(f"The scores are of k = {held}: add --k, one of these.")
        if self.k is not None and self.k not in ks:
            raise InputError(
                f"k is {self.k}, and the scores are of k = {held}: set k to one of these, or score "
                "the rows again with that one."
            )
        settled = dataclasses.replace(self, k=ks[0]) if self.k is None else self
        if settled.column not in columns:
            raise InputError(
                f"statistic is {self.statistic!r}; set it to median, mean, perplexity, or one of "
                f"the scores' columns: {', '.join(columns)}."
            )
        return settled

    @property
    def column(self) -> str:
        """The name of the column."""
        if self.statistic not in ("median", "mean"):
            return Mean().name if self.statistic == "perplexity" else self.statistic
        assert self.k is not None, "`among` fills in k"
        score = Median(self.k, self.unlearnable) if self.statistic == "median" else Mean(self.k)
        return score.name

    @property
    def learnable_column(self) -> str:
        """The name of the column with the share of learnable tokens."""
        return f"learnable_k{self.k}"


def checked_ks(k: int | Sequence[int]) -> tuple[int, ...]:
    """The ks in ascending order without duplicates.

    Raises:
      InputError: No k, or one that is not a whole number of at least 1.
    """
    ks = tuple(k) if isinstance(k, list | tuple) else (k,)
    for one in ks:
        if not isinstance(one, int) or isinstance(one, bool) or one < 1:
            raise InputError(f"k is {one!r}; set it to a whole number of at least 1.")
    if not ks:
        raise InputError("k is an empty list; set it to at least one whole number.")
    return tuple(sorted(set(ks)))


def column_names(ks: Sequence[int]) -> list[str]:
    """The names of the columns of `scores_of`."""
    return [score.name for score in scores_of(ks)]


def scores_of(ks: Sequence[int]) -> tuple[Score, ...]:
    """The scores that every pass computes: the paper's S for each k, and its controls."""
    of_k = ((Median(k), Median(k, "zero"), Mean(k), LearnableFraction(k)) for k in ks)
    return (Mean(), *(score for scores in of_k for score in scores))


def require_scores(scores: Sequence[Score]) -> None:
    """Raises InputError for an object that is not a score, or that needs an unknown token value."""
    for score in scores:
        if isinstance(score, type) or not isinstance(score, Score):
            raise InputError(
                f"scores has {score!r}; set it to a list of scores, such as "
                "[@scores.Mean()] in a gin file."
            )
        if lacking := {*score.needs} - {*TOKEN_VALUES}:
            needed, given = ", ".join(sorted(lacking)), ", ".join(TOKEN_VALUES)
            raise InputError(
                f"The score {score.name} needs {needed}; a token has {given}: correct its `needs`."
            )


def row_scores(
    tokens: Mapping[str, jax.Array], weights_BxL: jax.Array, scores: Sequence[Score]
) -> jax.Array:
    """Every score of each row, float32 [scores, B].

    A row whose losses of tokens that count have no finite sum scores NaN.

    Args:
      tokens: The loss and the other TOKEN_VALUES that the scores need, [B, L] each; at least 0, but
        arbitrary where the weight is 0.
      weights_BxL: Loss weights; tokens with a weight above 0 count.
      scores: At least one.

    Raises:
      InputError: A score does not return one number per row.
    """
    length = weights_BxL.shape[1]
    counts_BxL = (weights_BxL > 0) & (jnp.arange(length) > 0)[None]
    # Tokens that don't count are sorted last, with a rank above any k.
    after = {LOSS: jnp.inf, RANK: jnp.iinfo(jnp.int32).max, ENTROPY: 0.0}
    names = sorted(tokens, key=lambda name: name != LOSS)  # the loss first: the sort's key
    keyed = {name: jnp.where(counts_BxL, tokens[name], after[name]) for name in names}
    # One sort serves every score: for any k the learnable tokens are sorted, too.
    ordered = dict(zip(keyed, jax.lax.sort(tuple(keyed.values()), num_keys=1), strict=True))
    broken_B = ~jnp.isfinite(jnp.sum(jnp.where(counts_BxL, tokens[LOSS], 0.0), axis=-1))
    counts_BxL = jnp.arange(length)[None] < jnp.sum(counts_BxL, axis=-1, keepdims=True)
    ordered[LOSS] = jnp.where(counts_BxL, ordered[LOSS], 0.0)
    columns = []
    for score in scores:
        values_B = score.of_rows(ordered, counts_BxL)
        if values_B.shape != broken_B.shape:
            raise InputError(
                f"The score {score.name} is of shape {values_B.shape} for {len(broken_B)} rows; "
                "expected one number per row: correct its of_rows."
            )
        columns.append(values_B.astype(jnp.float32))
    return jnp.where(broken_B, jnp.nan, jnp.stack(columns))


def _require_unlearnable(unlearnable: str) -> None:
    if unlearnable not in UNLEARNABLE:
        raise InputError(
            f"unlearnable is {unlearnable!r}; set it to one of {', '.join(UNLEARNABLE)}."
        )
