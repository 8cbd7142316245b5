"""The score of a row against a plain NumPy reading of its definition."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill.chunked_loss import target_ranks
from salt_jax.distill.scores import ScoreConfig, masked_median, row_scores
from salt_jax.errors import InputError

VOCAB = 7


def oracle_row(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, config: ScoreConfig
) -> float:
    """S(x) of one row, token by token, in float64."""
    values, learnable, counted = [], 0, 0
    for t in range(1, len(targets)):
        if weights[t] == 0:
            continue
        counted += 1
        z = logits[t, :VOCAB]
        if (z > z[targets[t]]).sum() < config.k:
            learnable += 1
            z64 = z.astype(np.float64)
            log_sum = np.log(np.exp(z64 - z64.max()).sum()) + z64.max()
            values.append(log_sum - z64[targets[t]])
        elif config.unlearnable == "zero":
            values.append(0.0)
    if learnable == 0 or np.float32(learnable) / np.float32(counted) < np.float32(
        config.min_learnable_fraction
    ):
        return -np.inf
    return float(np.median(values))


def score(logits: Any, targets: Any, weights: Any, **settings: Any) -> np.ndarray:
    """From logits, through a head that gives hidden states back as they are."""
    hidden = jnp.asarray(logits)
    targets, weights = jnp.asarray(targets, jnp.int32), jnp.asarray(weights)
    head = jnp.eye(hidden.shape[-1])
    loss, greater = target_ranks(hidden, head, targets, weights, VOCAB, chunk_tokens=3)
    return np.asarray(row_scores(loss, greater, weights, ScoreConfig(**settings)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_numpy(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, length = 4, data.draw(st.sampled_from([1, 2, 5, 8]))
    config = ScoreConfig(
        k=data.draw(st.sampled_from([1, 3, VOCAB])),
        unlearnable=data.draw(st.sampled_from(["drop", "zero"])),
        min_learnable_fraction=data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    )
    scale = data.draw(st.sampled_from([1.0, 1e4]))
    # Few distinct logits, so that ties are common; the padded ids are the largest of all.
    logits = (scale * rng.integers(4, size=(rows, length, VOCAB + 2))).astype(np.float32)
    logits[..., VOCAB:] = 1e9
    targets = rng.integers(VOCAB, size=(rows, length))
    weights = rng.integers(2, size=(rows, length)).astype(np.float32)
    got = score(
        logits,
        targets,
        weights,
        k=config.k,
        unlearnable=config.unlearnable,
        min_learnable_fraction=config.min_learnable_fraction,
    )
    want = [oracle_row(logits[i], targets[i], weights[i], config) for i in range(rows)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * scale)


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
    assert score(*row, k=1, min_learnable_fraction=0.8) == pytest.approx([0.25], abs=1e-5)
    assert score(*row, k=1, min_learnable_fraction=0.81) == [-np.inf]


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
    assert np.isnan(score(logits, targets, weights, k=1)).all()


@pytest.mark.parametrize("count", range(1, 7))
def test_masked_median(count: int) -> None:
    values = np.random.default_rng(count).normal(size=(3, 6)).astype(np.float32)
    mask = np.zeros((3, 6), bool)
    mask[:, 6 - count :] = True
    got = masked_median(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(got, np.median(values[:, 6 - count :], axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"unlearnable": "keep"}, "set it to one of drop, zero"),
        ({"min_learnable_fraction": 1.5}, "min_learnable_fraction is 1.5"),
        ({"min_learnable_fraction": float("nan")}, "min_learnable_fraction is nan"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ScoreConfig(**bad)
