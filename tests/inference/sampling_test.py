"""Sampling against plain NumPy in float64: what can be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from salt_jax.errors import InputError
from salt_jax.inference.sampling import Sampling, sample_token

VOCABULARY = 7  # of 8 logits: the last one pads
DRAWS = 3000


def probabilities(weights_V: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    """Of each token, one step of the definition after the other; and how near a sum came to p."""
    p_V = weights_V.astype(np.float64) ** (1 / sampling.temperature)
    order = np.lexsort((np.arange(len(p_V)), -weights_V))  # ties: lower ids first
    p_V[order[sampling.top_k or len(p_V) :]] = 0
    p_V /= p_V.sum()
    sums_V = np.cumsum(p_V[order])
    if sampling.top_p == 1:
        return p_V, 1.0
    p_V[order[np.searchsorted(sums_V, sampling.top_p) + 1 :]] = 0
    return p_V / p_V.sum(), np.abs(sums_V - sampling.top_p).min()


def draw(weights_V: np.ndarray, sampling: Sampling, draws: int = DRAWS) -> np.ndarray:
    """Tokens of as many rows with one key each."""
    logits_V = np.append(np.log(weights_V), 5.0).astype(np.float32)
    logits_BxV = jnp.tile(jnp.asarray(logits_V)[None], (draws, 1))
    keys_B = jax.random.split(jax.random.key(sampling.seed), draws)
    token_B, log_p_B = sample_token(logits_BxV, keys_B, sampling, VOCABULARY)
    expected_V = np.log(weights_V / weights_V.sum())  # of the model: before anything is left out
    np.testing.assert_allclose(log_p_B, expected_V[np.asarray(token_B)], atol=1e-5)
    return np.asarray(token_B)


@settings(max_examples=40, deadline=None)
@given(
    # A few values for many ties; the least likely of 7 tokens is drawn in 3,000 draws.
    weights=st.lists(st.sampled_from([4, 5, 7, 9]), min_size=VOCABULARY, max_size=VOCABULARY),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.integers(0, VOCABULARY + 2),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.9, 1.0]),
)
def test_draws_what_the_definition_allows_and_all_of_it(
    weights: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    weights_V = np.array(weights)
    p_V, margin = probabilities(weights_V, sampling)
    assume(margin > 1e-4)  # where a sum is p itself, float32 may see it on the other side
    assert {*draw(weights_V, sampling).tolist()} == set(np.flatnonzero(p_V))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.6, seed=2),
        Sampling(1.7, top_k=4, seed=3),
        Sampling(0.8, top_k=5, top_p=0.83, seed=4),
        Sampling(1.0, top_p=0.9, seed=5),
    ],
)
def test_draws_as_often_as_the_definition_says(sampling: Sampling) -> None:
    weights_V = np.array([3, 11, 1, 7, 7, 2, 5])
    p_V, _ = probabilities(weights_V, sampling)
    counts_V = np.bincount(draw(weights_V, sampling, 20_000), minlength=VOCABULARY)
    possible_V = p_V > 0
    assert counts_V[~possible_V].sum() == 0
    result = scipy.stats.chisquare(counts_V[possible_V], 20_000 * p_V[possible_V])
    assert result.pvalue > 0.01


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1, 1), Sampling(1, top_p=1e-60)])
def test_the_first_of_the_most_likely(sampling: Sampling) -> None:
    assert {*draw(np.array([1, 3, 9, 9, 2, 9, 1]), sampling, 50).tolist()} == {2}


def test_a_row_is_drawn_by_its_own_key() -> None:
    logits_BxV = jax.random.normal(jax.random.key(0), (6, 50))
    keys_B = jax.random.split(jax.random.key(1), 6)
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=20, top_p=0.9)):
        together, _ = sample_token(logits_BxV, keys_B, sampling, 50)
        alone = [
            sample_token(logits_BxV[i : i + 1], keys_B[i : i + 1], sampling, 50)[0][0]
            for i in range(6)
        ]
        assert together.tolist() == [int(token) for token in alone]
    assert len({*together.tolist()}) > 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Sampling(**settings)
