"""Paired differences over groups of tokens, and what their intervals cover."""

import numpy as np
import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.evaluation.paired_comparison import (
    DECILES,
    Tokens,
    difference_table,
    differences,
    token_groups,
)


def of_pieces(seed: int, pieces: int = 40, length: int = 16, spread: float = 1.0) -> Tokens:
    """Tokens whose difference is 0.1 on average and the same within a piece but for noise."""
    rng = np.random.default_rng(seed)
    effect_P = 0.1 + spread * rng.normal(size=pieces)
    piece_N = np.repeat(np.arange(pieces), length)
    other_N = rng.gamma(2.0, size=len(piece_N))
    losses_MxN = np.stack([other_N + effect_P[piece_N], other_N]).astype(np.float32)
    position_N = np.tile(np.arange(length, dtype=np.int32), pieces)
    return Tokens(losses_MxN, piece_N, piece_N % 2, position_N)


def test_intervals_cover_the_mean_over_documents() -> None:
    everything = {"all": {"all": np.ones(40 * 16, bool)}}
    found = [differences(of_pieces(seed), everything)["all"]["all"] for seed in range(100)]
    covered = sum(each.low <= 0.1 <= each.high for each in found)
    assert 88 <= covered <= 99
    # Of independent tokens they would be a quarter as wide and cover half.
    assert sum(abs(each.mean - 0.1) <= (each.high - each.low) / 8 for each in found) < 60


def test_groups_are_disjoint_and_share_their_tokens(cache: PackedCache) -> None:
    tokens = of_pieces(0, length=cache.sequence_length)
    hardness_N = np.linspace(0, 1, len(tokens.pieces), dtype=np.float32)
    tokens = Tokens(
        np.concatenate([tokens.losses, hardness_N[None]]),
        tokens.pieces,
        tokens.subsets,
        tokens.positions,
    )
    by_kind = token_groups(tokens, cache)
    assert len(by_kind["by_decile"]) == DECILES
    for of_kind in by_kind.values():
        assert (sum(mask_N.astype(int) for mask_N in of_kind.values()) == 1).all()
    found = differences(tokens, by_kind)
    d_N = tokens.losses[0].astype(float) - tokens.losses[1]
    for kind, of_kind in by_kind.items():
        for name, mask_N in of_kind.items():
            each = found[kind][name]
            assert each.mean == pytest.approx(d_N[mask_N].mean())
            assert each.low < each.mean < each.high
            assert each.tokens == mask_N.sum()
            assert each.pieces == len(np.unique(tokens.pieces[mask_N]))
    shown = difference_table(found, "a model compared with another")
    assert len(shown.rows) == sum(map(len, by_kind.values()))


def test_the_other_way_round_is_the_negative() -> None:
    tokens = of_pieces(1)
    by_kind = {"by_subset": {"even": tokens.subsets == 0, "odd": tokens.subsets == 1}}
    turned = Tokens(tokens.losses[::-1], tokens.pieces, tokens.subsets, tokens.positions)
    for name, each in differences(tokens, by_kind)["by_subset"].items():
        other = differences(turned, by_kind)["by_subset"][name]
        ends = (other.mean, other.low, other.high)
        assert (-each.mean, -each.high, -each.low) == pytest.approx(ends)
