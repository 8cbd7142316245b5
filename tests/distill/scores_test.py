"""What is known of a row against a plain NumPy reading of its definition."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill.chunked_loss import target_ranks
from salt_jax.distill.scores import (
    TOKEN_VALUES,
    Mean,
    ScoreConfig,
    TrimmedMean,
    checked_ks,
    column_names,
    require_scores,
    row_scores,
    scores_of,
)
from salt_jax.errors import InputError

VOCAB = 7


def oracle_row(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, ks: tuple[int, ...]
) -> dict[str, float]:
    """All columns of one row, token by token, in float64."""
    losses, ranks, entropies = [], [], []
    for t in range(1, len(targets)):
        if weights[t] > 0:
            z = logits[t, :VOCAB]
            z64 = z.astype(np.float64)
            log_sum = np.log(np.exp(z64 - z64.max()).sum()) + z64.max()
            losses.append(log_sum - z64[targets[t]])
            ranks.append((z > z[targets[t]]).sum())
            log_p = z64 - log_sum
            entropies.append(-(np.exp(log_p) * log_p).sum())
    columns = {"log_perplexity": float(np.mean(losses)) if losses else -np.inf}
    for k in ks:
        learnable = [loss for loss, rank in zip(losses, ranks, strict=True) if rank < k]
        zeros = [0.0] * (len(losses) - len(learnable))
        columns[f"median_drop_k{k}"] = float(np.median(learnable)) if learnable else -np.inf
        columns[f"median_zero_k{k}"] = float(np.median(learnable + zeros)) if learnable else -np.inf
        columns[f"mean_k{k}"] = float(np.mean(learnable)) if learnable else -np.inf
        columns[f"learnable_k{k}"] = len(learnable) / max(len(losses), 1)
    columns["entropy"] = float(np.mean(entropies)) if entropies else -np.inf
    for k in ks:
        kept = sorted(loss for loss, rank in zip(losses, ranks, strict=True) if rank < k)
        cut = int(0.3 * len(kept))
        kept = kept[cut : len(kept) - cut]
        columns[f"trimmed_mean_0.3_k{k}"] = float(np.mean(kept)) if kept else -np.inf
    return columns


@functools.partial(jax.jit, static_argnums=3)
def _statistics(
    hidden: jax.Array, targets: jax.Array, weights: jax.Array, ks: tuple[int, ...]
) -> jax.Array:
    head = jnp.eye(hidden.shape[-1])
    values = target_ranks(hidden, head, targets, weights, VOCAB, chunk_tokens=3, entropy=True)
    tokens = dict(zip(TOKEN_VALUES, values, strict=True))
    return row_scores(tokens, weights, [*scores_of(ks), *_more(ks)])


def _more(ks: tuple[int, ...]) -> list[Any]:
    return [Mean(value="entropy"), *(TrimmedMean(k, 0.3) for k in ks)]


def columns(logits: Any, targets: Any, weights: Any, *ks: int) -> dict[str, np.ndarray]:
    """From logits, through a head that gives hidden states back as they are."""
    rows = jnp.asarray(logits), jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)
    values = np.asarray(_statistics(*rows, ks))
    assert values.dtype == np.float32
    names = [*column_names(ks), *(score.name for score in _more(ks))]
    return dict(zip(names, values, strict=True))


def score(logits: Any, targets: Any, weights: Any, k: int, unlearnable: str = "drop") -> np.ndarray:
    return columns(logits, targets, weights, k)[ScoreConfig(k, unlearnable=unlearnable).column]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_numpy(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, length = 4, data.draw(st.sampled_from([1, 2, 8]))
    ks = data.draw(st.sampled_from([(3,), (1, 2, VOCAB)]))
    scale = data.draw(st.sampled_from([1.0, 1e4]))
    # Few distinct logits, so that ties are common; the padded ids are the largest of all.
    logits = (scale * rng.integers(4, size=(rows, length, VOCAB + 2))).astype(np.float32)
    logits[..., VOCAB:] = 1e9
    targets = rng.integers(VOCAB, size=(rows, length))
    weights = rng.integers(2, size=(rows, length)).astype(np.float32)
    got = columns(logits, targets, weights, *ks)
    want = [oracle_row(logits[i], targets[i], weights[i], ks) for i in range(rows)]
    assert list(got) == [*want[0]]
    for name, values in got.items():
        expected = [row[name] for row in want]
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6 * scale, err_msg=name)


def test_several_k_in_one_pass_are_each_what_it_is_alone() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 9, VOCAB)), rng.integers(VOCAB, size=(3, 9)), np.ones((3, 9))
    together = columns(*rows, 1, 2, 4)
    for k in (1, 2, 4):
        for name, values in columns(*rows, k).items():
            np.testing.assert_array_equal(together[name], values)


def row_of(losses: list[float], learnable: list[bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row whose token t + 1 has about losses[t] and is within the top 1 or not."""
    logits = np.full((1, len(losses) + 1, VOCAB), -50.0, np.float32)
    for t, (loss, first) in enumerate(zip(losses, learnable, strict=True)):
        # Spread over enough others that the truth is still the largest; or one other has nearly
        # all.
        others = np.exp(-loss) if first else 1.0
        logits[0, t + 1, 0] = -loss
        count = VOCAB - 1 if first else 1
        logits[0, t + 1, 1 : 1 + count] = np.log((1.0 - np.exp(-loss)) * others / count / others)
    return logits, np.zeros((1, len(losses) + 1)), np.ones((1, len(losses) + 1))


def test_median_of_learnable_tokens() -> None:
    losses, learnable = [0.3, 0.1, 5.0, 0.5, 0.2], [True, True, False, True, True]
    row = row_of(losses, learnable)
    assert score(*row, k=1) == pytest.approx([0.25], abs=1e-5)  # the middle two of an even count
    assert score(*row, k=1, unlearnable="zero") == pytest.approx([0.2], abs=1e-5)
    assert score(*row, k=2) == pytest.approx([0.3], abs=1e-5)
    assert columns(*row, 1)["learnable_k1"] == pytest.approx([0.8])


def test_ties_at_rank_k_count_as_among_the_k() -> None:
    logits = np.zeros((1, 2, VOCAB), np.float32)  # every id is as likely as every other
    assert score(logits, [[0, 6]], [[1, 1]], k=1) == pytest.approx([np.log(VOCAB)])
    logits[0, 1, 0] = 1.0  # one id is strictly more likely: the truth is of rank 2
    assert score(logits, [[0, 6]], [[1, 1]], k=1) == [-np.inf]
    assert np.isfinite(score(logits, [[0, 6]], [[1, 1]], k=2))


@pytest.mark.parametrize("unlearnable", ["drop", "zero"])
def test_no_learnable_token_and_nothing_that_counts(unlearnable: str) -> None:
    logits, targets, weights = row_of([3.0, 3.0], [False, False])
    assert score(logits, targets, weights, k=1, unlearnable=unlearnable) == [-np.inf]
    assert score(logits, targets, 0 * weights, k=7, unlearnable=unlearnable) == [-np.inf]


def test_first_position_and_weight_zero_do_not_count() -> None:
    logits, targets, weights = row_of([0.3, 0.1, 0.2], [True] * 3)
    logits[0, 0] = np.nan  # the first position, whatever it holds
    weights[0, 2], targets[0, 2] = 0.0, -1
    logits[0, 2] = np.nan
    assert score(logits, targets, weights, k=1) == pytest.approx([0.25], abs=1e-5)


def test_a_broken_scorer_shows() -> None:
    logits, targets, weights = row_of([0.3, 0.1, 0.2], [True] * 3)
    logits[0, 2, 5] = np.nan
    for values in columns(logits, targets, weights, 1, 3).values():
        assert np.isnan(values).all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"unlearnable": "keep"}, "set it to one of drop, zero"),
        ({"statistic": "mean", "unlearnable": "zero"}, "leave it out, or set statistic to median"),
        ({"min_learnable_fraction": 1.5}, "min_learnable_fraction is 1.5"),
        ({"min_learnable_fraction": float("nan")}, "min_learnable_fraction is nan"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ScoreConfig(**bad)


@pytest.mark.parametrize("trim", [-0.1, 0.5, float("nan")])
def test_a_trim_that_leaves_nothing_is_named(trim: float) -> None:
    with pytest.raises(InputError, match=r"TrimmedMean\.trim is"):
        TrimmedMean(3, trim)


def test_one_k_or_several() -> None:
    assert checked_ks(10) == (10,)
    assert checked_ks([20, 5, 20]) == (5, 20)
    for bad, words in (([], "empty list"), ([5, 0], "k is 0"), (True, "k is True"), ("5", "'5'")):
        with pytest.raises(InputError, match=words):
            checked_ks(bad)  # type: ignore[arg-type]


def test_the_k_is_settled_by_what_the_scores_hold() -> None:
    names = column_names([5, 7, 10])
    assert ScoreConfig().among([7], names).column == "median_drop_k7"
    assert ScoreConfig(5, "mean").among([5, 10], names).column == "mean_k5"
    assert ScoreConfig(5, "perplexity").column == "log_perplexity"
    assert ScoreConfig(statistic="p75").among([5], ["p75"]).column == "p75"
    with pytest.raises(InputError, match=r"statistic is 'mode'; set it to median, mean, .*_k10"):
        ScoreConfig(5, "mode").among([5, 10], names)
    with pytest.raises(InputError, match="The scores are of k = 5, 10: add --k"):
        ScoreConfig().among([5, 10], names)
    with pytest.raises(InputError, match="k is 7, and the scores are of k = 5, 10"):
        ScoreConfig(7).among([5, 10], names)


@dataclasses.dataclass(frozen=True)
class Own:
    """A score of one's own: the highest loss."""

    name: str = "highest"
    needs: tuple[str, ...] = ("loss",)
    axis: int | None = -1

    def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(counts_BxL, tokens["loss"], -jnp.inf), axis=self.axis)


def test_a_score_gets_its_tokens_by_ascending_loss() -> None:
    loss = jnp.array([[9.0, 3.0, 1.0, 2.0, 7.0], [9.0, 1.0, 2.0, 3.0, 4.0]])
    rank = jnp.array([[0, 30, 10, 20, 70], [0, 1, 2, 3, 4]])
    weights = jnp.array([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    seen: dict[str, Any] = {}

    class Looks(Own):
        def of_rows(self, tokens: Mapping[str, jax.Array], counts_BxL: jax.Array) -> jax.Array:
            seen.update(tokens, counts=counts_BxL)
            return super().of_rows(tokens, counts_BxL)

    (values,) = row_scores({"rank": rank, "loss": loss}, weights, [Looks()])
    np.testing.assert_array_equal(values, [3, 4])
    np.testing.assert_array_equal(seen["loss"], [[1, 2, 3, 0, 0], [1, 2, 3, 4, 0]])
    np.testing.assert_array_equal(seen["rank"][0, :3], [10, 20, 30])
    assert seen["rank"][0, 3:].min() > 10**9
    np.testing.assert_array_equal(seen["counts"].sum(-1), [3, 4])


def test_what_is_no_score_is_named() -> None:
    require_scores([Mean(), Own()])
    for bad in ("median", Own, lambda tokens: tokens):
        with pytest.raises(InputError, match=r"set it to a list of scores, such as .@scores.Mean"):
            require_scores([bad])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"highest needs depth; .* has loss, rank, entropy"):
        require_scores([Own(needs=("loss", "depth"))])
    with pytest.raises(InputError, match=r"highest is of shape \(\) for 3 rows; expected one"):
        row_scores({"loss": jnp.ones((3, 4))}, jnp.ones((3, 4)), [Own(axis=None)])
