"""Log-likelihoods of continuations that share a row, against a forward pass each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.evaluation.harness import HarnessModel
from salt_jax.models import decoder
from tests.evaluation.conftest import CONFIG


def log_p(params: Any, inputs: list[int]) -> np.ndarray:
    """Of every next id, [L, V], by whole logits."""
    ids = jnp.array([inputs])
    positions = jnp.arange(len(inputs))[None]
    batch = {"inputs": ids, "segment_ids": jnp.ones_like(ids), "positions": positions}
    hidden = decoder.hidden_states(CONFIG, params, batch)
    logits = decoder.logits(hidden, decoder.head_kernel(params, CONFIG), CONFIG)
    return np.asarray(jax.nn.log_softmax(logits[0, :, : CONFIG.vocab_size]))


@pytest.mark.slow
def test_sequences_of_the_same_inputs(harness: Callable[..., HarnessModel], params: Any) -> None:
    rng = np.random.default_rng(0)
    contexts = [[int(i) for i in rng.integers(3, 259, size)] for size in (5, 30, 70, 5, 1)]
    sequences = [
        ([*context, last], min(scored, len(context)))
        for context in contexts
        for last, scored in ((7, 1), (8, 1), (9, 3), (7, 20), (250, 1))
    ]
    sequences += [([*contexts[0], 7, 9], 2)]
    best = int(log_p(params, contexts[1])[-1].argmax())
    sequences += [([*contexts[1], best], 1), ([*contexts[1], best, 3], 2)]
    known = {
        inputs: log_p(params, [*inputs]) for inputs in {tuple(ids[:-1]) for ids, _ in sequences}
    }
    found = harness()._answers.log_likelihoods(sequences)
    for (ids, scored), (nats, greedy) in zip(sequences, found, strict=True):
        expected, targets = known[tuple(ids[:-1])][-scored:], np.array(ids[-scored:])
        np.testing.assert_allclose(nats, expected[np.arange(scored), targets].sum(), atol=1e-4)
        assert greedy == (expected.argmax(-1) == targets).all()
    assert found[-2][1], "the most likely last token"
