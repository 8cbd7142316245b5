"""The numbers of an audit against counting row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.distill import audit, selection
from salt_jax.distill.audit import RowFacts

NAMES = ("prose", "code", "empty", "web")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several blocks, and a few hashes several parts."""
    monkeypatch.setattr(selection, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(audit, "_HASH_BYTES", 80)


def some_rows(seed: int, rows: int) -> tuple[RowFacts, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.5, 1.0, 1.5, 2.0, 3.0, -np.inf, np.nan], rows).astype(np.float32)
    losses = np.where(np.isnan(scores), np.nan, rng.random(rows)).astype(np.float32)
    facts = RowFacts(
        subset_names=NAMES,
        subsets=rng.choice([0, 1, 3], rows).astype(np.uint16),
        scores=scores,
        losses=losses,
        learnable=rng.random(rows).astype(np.float32),
        hashes=rng.integers(rows, size=rows, dtype=np.uint64) * np.uint64(2**57),
    )
    return facts, np.sort(rng.choice(rows, size=int(rng.integers(1, rows + 1)), replace=False))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60))
def test_by_subset(seed: int, rows: int) -> None:
    facts, kept = some_rows(seed, rows)
    found = audit.by_subset(facts, kept)
    edges = np.array(found["score_edges"])
    subsets, scores = np.asarray(facts.subsets), np.asarray(facts.scores)
    is_kept = np.isin(np.arange(rows), kept)
    assert list(found["by_subset"]) == [NAMES[i] for i in sorted({*subsets.tolist()})]
    assert "empty" not in found["by_subset"]
    parts = [("whole", found["whole"], np.ones(rows, bool))]
    parts += [(n, part, subsets == NAMES.index(n)) for n, part in found["by_subset"].items()]
    for name, part, mine in parts:
        assert part["rows"] == mine.sum()
        assert part["kept"] == (mine & is_kept).sum()
        assert part["kept_share"] == pytest.approx((mine & is_kept).sum() / mine.sum())
        assert part["share_of_kept"] == pytest.approx((mine & is_kept).sum() / len(kept))
        lowest = scores[mine & is_kept & np.isfinite(scores)]
        assert part["lowest_kept"] == (lowest.min() if len(lowest) else None)
        for suffix, taken in (("", mine), ("_kept", mine & is_kept)):
            finite = scores[taken & np.isfinite(scores)]
            assert part[f"scores{suffix}"] == np.histogram(finite, edges)[0].tolist(), name
            for key, values in (("log_perplexity", facts.losses), ("learnable", facts.learnable)):
                known = np.asarray(values)[taken & np.isfinite(values)]
                expected = pytest.approx(known.mean(), rel=1e-5) if len(known) else None
                assert part[key + suffix] == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60))
def test_overlap_duplicates_and_rows_to_show(seed: int, rows: int) -> None:
    facts, kept = some_rows(seed, rows)
    _, others = some_rows(seed + 1, rows)
    shared = len({*kept.tolist()} & {*others.tolist()})
    found = audit.overlap(kept, others, rows)
    assert (found["rows"], found["shared"]) == (len(others), shared)
    assert found["jaccard"] == shared / len({*kept.tolist()} | {*others.tolist()})
    assert found["share_of_this"] == shared / len(kept)
    assert found["share_of_other"] == shared / len(others)
    assert found["share_by_chance"] == len(others) / rows

    hashes = np.asarray(facts.hashes)
    copies = audit.duplicates(facts.hashes, kept)
    assert copies["all"] == rows - len({*hashes.tolist()})
    assert copies["kept"] == len(kept) - len({*hashes[kept].tolist()})

    scores = np.asarray(facts.scores)
    tied = [i for i in range(rows) if scores[i] == 1.5]
    ties = {"rows": len(tied), "kept": len({*tied} & {*kept.tolist()})}
    assert audit.ties(facts, kept, 1.5) == ties
    scored = [i for i in range(rows) if np.isfinite(scores[i])]
    mine = [i for i in scored if i in kept]
    down = sorted(mine, key=lambda i: (-scores[i], i))
    up = sorted(mine, key=lambda i: (scores[i], i))
    rest = sorted((i for i in scored if i not in kept), key=lambda i: (-scores[i], i))
    assert audit.rows_to_show(facts, kept, by_score=True) == {
        "highest": down[:20],
        "lowest_kept": up[:20],
        "cut_kept": up[:10],
        "cut_left_out": rest[:10],
        "lowest": sorted(scored, key=lambda i: (scores[i], i))[:20],
    }
    assert "cut_kept" not in audit.rows_to_show(facts, kept, by_score=False)
    by_cut = audit.rows_to_show(facts, kept, by_score=True, stratified=True)
    of = np.asarray(facts.subsets)
    for name, nearest in (("cut_kept", up), ("cut_left_out", rest)):
        assert by_cut[name] == [i for s in range(4) for i in [i for i in nearest if of[i] == s][:2]]
