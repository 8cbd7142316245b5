"""Scores of rows: what a scorer says of each token in, one number a row out, for `salt score`.

    S(x) = median over { t : y_t is among the scorer's k most likely ids } of  -log P(y_t | y_<t)

in nats (arXiv 2410.18779, section on data selection). "Among the k most likely" means that fewer
than k ids have a strictly greater logit. Tokens that count: weight above 0, and not the row's
first, which may have no context.

A score is an object that names its column and the values of a token that it needs. All scores of a
pass share them, in order of the loss. `ScoreConfig` says which column is a row's score.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from salt_jax.errors import InputError

UNLEARNABLE = ("drop", "zero")

# What a scorer says of a token: -log P of the truth, nats; how many ids have a greater logit; the
# entropy of its distribution, nats. `chunked_loss.target_ranks` makes them.
LOSS, RANK, ENTROPY = TOKEN_VALUES = ("loss", "rank", "entropy")

LOG_PERPLEXITY = "log_perplexity"


@runtime_checkable
class Score(Protocol):
    """A number a row, from its tokens.

    Attributes:
        name: of its column; scores that differ in a setting have different ones.
        needs: which of TOKEN_VALUES it reads.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Collection[str]: ...

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        """The score of each row, [B]; -inf where it has none. Part of a jitted program.

        Args:
            tokens: of each value needed [B, L], a row's tokens by ascending loss, those that count
                first; of the others the loss and the entropy are 0, and the rank is above any k.
            counts_BxL: whether a token counts.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Median:
    """METHOD.md's S: the median loss of the tokens that are among the scorer's k most likely.

    Attributes:
        k: see the module's formula.
        unlearnable: what becomes of the other tokens: "drop", or "zero" to count them as 0.
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
        learnable_BxL = tokens[RANK] < self.k
        learnable_B = jnp.sum(learnable_BxL, axis=-1)
        others_B = jnp.sum(counts_BxL, axis=-1) - learnable_B
        zeros_B = others_B if self.unlearnable == "zero" else 0 * others_B
        median_B = _ranked_median(tokens[LOSS], learnable_BxL, learnable_B, zeros_B)
        return jnp.where(learnable_B > 0, median_B, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean loss of the tokens that are among the scorer's k most likely."""

    k: int

    needs: ClassVar[Collection[str]] = (LOSS, RANK)

    def __post_init__(self) -> None:
        checked_ks(self.k)

    @property
    def name(self) -> str:
        return f"mean_k{self.k}"

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        return _mean(tokens[LOSS], tokens[RANK] < self.k)


@dataclasses.dataclass(frozen=True)
class LearnableFraction:
    """The share, of the tokens that count, of those among the scorer's k most likely."""

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
class MeanLoss:
    """The mean loss of all tokens that count."""

    name: ClassVar[str] = LOG_PERPLEXITY
    needs: ClassVar[Collection[str]] = (LOSS,)

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        return _mean(tokens[LOSS], counts_BxL)


@dataclasses.dataclass(frozen=True)
class MeanEntropy:
    """The mean entropy of the scorer's distributions over the tokens that count, nats."""

    name: ClassVar[str] = ENTROPY
    needs: ClassVar[Collection[str]] = (ENTROPY,)

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        return _mean(tokens[ENTROPY], counts_BxL)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a row's score is, among the columns that `salt score` made.

    Attributes:
        k: a token is learnable if its truth is among the scorer's k most likely ids; may be left
            open where the scores are of one k alone.
        statistic: "median": METHOD.md's S. "mean": the mean loss of learnable tokens. "perplexity":
            the mean loss of all tokens that count, in nats, learnable or not. Else a column by its
            name.
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
        _require_unlearnable(self.unlearnable)
        if self.statistic != "median" and self.unlearnable != "drop":
            raise InputError(
                f"unlearnable is {self.unlearnable!r} and statistic {self.statistic!r}: it says "
                "what becomes of tokens in a median; leave it out, or set statistic to median."
            )
        if not 0.0 <= self.min_learnable_fraction <= 1.0:
            raise InputError(
                f"min_learnable_fraction is {self.min_learnable_fraction}; set it within [0, 1]."
            )

    def among(self, ks: Sequence[int], columns: Collection[str]) -> "ScoreConfig":
        """The same with its k settled.

        Args:
            ks: what the scores hold.
            columns: the names of theirs.

        Raises:
            InputError: they hold several k and k is open, or not this one; or no such column.
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
        """The column that holds it."""
        k = self.k or 0  # settled by `among`
        if self.statistic == "median":
            return Median(k, self.unlearnable).name
        return {"mean": Mean(k).name, "perplexity": LOG_PERPLEXITY}.get(
            self.statistic, self.statistic
        )

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
    """The columns of `scores_of`."""
    return [score.name for score in scores_of(ks)]


def scores_of(ks: Sequence[int]) -> tuple[Score, ...]:
    """What every pass makes: METHOD.md's S of each k, and what it is compared with."""
    kinds = Median, functools.partial(Median, unlearnable="zero"), Mean, LearnableFraction
    return (MeanLoss(), *(kind(k) for k in ks for kind in kinds))


def require_scores(scores: Sequence[Score]) -> None:
    """Refuses what can't be scored by.

    Raises:
        InputError: something that is no score, or one that needs what no scorer gives.
    """
    for score in scores:
        if isinstance(score, type) or not isinstance(score, Score):
            raise InputError(
                f"scores has {score!r}; set it to a list of scores, such as "
                "[@scores.MeanEntropy()] in a gin file."
            )
        if lacking := {*score.needs} - {*TOKEN_VALUES}:
            needed, given = ", ".join(sorted(lacking)), ", ".join(TOKEN_VALUES)
            raise InputError(
                f"The score {score.name} needs {needed}; of each token there is {given}."
            )


def row_scores(
    tokens: Mapping[str, jax.Array], weights_BxL: jax.Array, scores: Sequence[Score]
) -> jax.Array:
    """Every score of each row, float32 [scores, B].

    Args:
        tokens: [B, L] of each of TOKEN_VALUES that a score needs, and the loss: at least 0. Where
            the weight is 0, anything.
        weights_BxL: loss weights; above 0 counts.
        scores: at least one.

    Returns:
        NaN throughout for a row where the losses of the tokens that count have no finite sum: the
        scorer is broken there.

    Raises:
        InputError: a score is not one number a row.
    """
    length = weights_BxL.shape[1]
    counts_BxL = (weights_BxL > 0) & (jnp.arange(length) > 0)[None]
    # Those that don't count go last, with a rank that no k takes.
    after = {LOSS: jnp.inf, RANK: jnp.iinfo(jnp.int32).max, ENTROPY: 0.0}
    names = sorted(tokens, key=lambda name: name != LOSS)  # which is what they are sorted by
    keyed = {name: jnp.where(counts_BxL, tokens[name], after[name]) for name in names}
    # One sort serves every score: the tokens learnable for a k, in this order, are in order too.
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
                "expected one number a row."
            )
        columns.append(values_B.astype(jnp.float32))
    return jnp.where(broken_B, jnp.nan, jnp.stack(columns))


def _mean(values_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
    """The mean of the values under the mask, [B]; -inf where there is none."""
    count_B = jnp.sum(mask_BxL, axis=-1)
    sum_B = jnp.sum(jnp.where(mask_BxL, values_BxL, 0.0), axis=-1)
    return jnp.where(count_B > 0, sum_B / jnp.maximum(count_B, 1), -jnp.inf)


def _require_unlearnable(unlearnable: str) -> None:
    if unlearnable not in UNLEARNABLE:
        raise InputError(
            f"unlearnable is {unlearnable!r}; set it to one of {', '.join(UNLEARNABLE)}."
        )


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
