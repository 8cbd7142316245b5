"""UL2's objectives: nothing of a row is lost but its stated tail, and all of it follows from the
seed, the row and the epoch."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.data.denoisers import UL2_DENOISERS, DenoisedRow, Denoising, Objectives, SpanDenoiser
from salt_jax.data.features import Row, make_row, shift_right
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError

VOCABULARY = ByteVocabulary(reserved=200)
MODES = VOCABULARY.mode_ids
SENTINELS = VOCABULARY.sentinel_ids


def row(*lengths: int, padding: int = 0, row_id: int = 0) -> Row:
    """Segments of these lengths, every token another; the first has no loss weight."""
    tokens = sum(lengths)
    weights = np.ones(tokens + padding, np.float32)
    weights[0] = weights[tokens:] = 0
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    targets = np.concatenate([np.arange(3, 3 + tokens), np.zeros(padding, int)])
    return make_row(targets, weights, segments, 1, row_id)


def denoising(length: int, *, seed: int = 0, teacher: str = "all", **objectives: Any) -> Denoising:
    return Denoising(Objectives(**objectives), VOCABULARY, length, seed, teacher)


def drawn(objective: str, **settings: Any) -> dict[str, Any]:
    return {"causal": 0, "prefix": 0, "span": 0, objective: 1, **settings}


def test_the_docstring_examples() -> None:
    """Of many epochs some draw what the module's docstring shows."""

    class Small(ByteVocabulary):
        reserved_ids = range(100, 120)

    vocabulary = Small(reserved=20)
    tokens = make_row(np.arange(5, 17), np.arange(12) > 0, np.ones(12, int))
    r = SpanDenoiser("R", mean_span=2, rate=0.4)
    prefix = Denoising(Objectives(**drawn("prefix")), vocabulary, 12, 0)
    span = Denoising(Objectives(**drawn("span", denoisers=[r])), vocabulary, 12, 0)

    def shown(denoiser: Denoising) -> set[tuple[tuple[int, ...], ...]]:
        rows = [denoiser(tokens, epoch) for epoch in range(300)]
        parts = [(x.row["targets"], x.row["loss_weights"], x.context) for x in rows]
        return {tuple(tuple(map(int, part)) for part in x) for x in parts}

    assert (
        (101, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0),
    ) in shown(prefix)
    assert (
        (100, 5, 6, 103, 8, 9, 104, 103, 7, 104, 10, 11),
        (0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0),
    ) in shown(span)


def restored(segment: np.ndarray) -> tuple[list[int], int, int]:
    """A corrupted segment's tokens put together again, its spans, and where its targets begin."""
    tokens = [token for token in segment.tolist() if token not in MODES.values()]
    begins = next(i for i, t in enumerate(tokens) if t in SENTINELS and t in tokens[:i])
    spans: dict[int, list[int]] = {}
    for token in tokens[begins:]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    text = [[t] if t not in SENTINELS else spans[t] for t in tokens[:begins]]
    assert list(spans) == list(SENTINELS[: len(spans)])
    assert [t for t in tokens[:begins] if t in SENTINELS] == list(spans)
    return sum(text, []), len(spans), begins + len(segment) - len(tokens)  # noqa: RUF017


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=3),
    st.integers(0, 4),
    st.floats(0.05, 0.95),
    st.floats(1, 12),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_corrupted_row_holds_its_tokens(
    lengths: list[int], padding: int, rate: float, mean_span: float, modes: bool, epoch: int
) -> None:
    """All but the tail, once each and in order, segment by segment; the row's shape stays."""
    denoiser = SpanDenoiser("X", mean_span, rate)
    original = row(*lengths, padding=padding)
    changed = denoising(200, **drawn("span", denoisers=[denoiser], mode_tokens=modes))(
        original, epoch
    )
    segments_L, targets_L = changed.row["segment_ids"], changed.row["targets"]
    end = 0
    for i, length in enumerate(lengths):
        begin, end = end, end + length
        places = np.arange(begin, end)[segments_L[begin:end] == i + 1]
        before, now = original["targets"][begin:end], targets_L[places]
        left_over = length - len(places)
        assert (segments_L[begin:end][: len(places)] == i + 1).all()
        assert (segments_L[begin:end][len(places) :] == 0).all()
        assert left_over <= 2
        if length < 4 + modes:
            np.testing.assert_array_equal(before, now)
            continue
        tokens, spans, targets_begin = restored(now)
        assert len(tokens) == length - modes - 2 * spans - left_over >= 2
        np.testing.assert_array_equal(tokens, before[: len(tokens)])
        # No token more would have fitted.
        more = len(tokens) + 1
        corrupted = min(max(round(more * rate), 1), more - 1)
        most = min(max(round(corrupted / mean_span), 1), corrupted, more - corrupted)
        assert more + 2 * most + modes > length
        assert (targets_L[begin] == MODES["X"]) == modes
        weights = changed.row["loss_weights"][places]
        assert not weights[:targets_begin].any()
        assert weights[targets_begin:].all()
        assert changed.context[begin:end].tolist() == [i <= targets_begin for i in range(length)]
    assert (segments_L[end:] == 0).all()
    assert not changed.is_causal
    assert changed.row["row_id"] == original["row_id"]
    assert changed.row["subset"] == 1


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_prefix_row_is_trained_on_its_suffix(
    lengths: list[int], padding: int, modes: bool, epoch: int
) -> None:
    original = row(*lengths, padding=padding)
    changed = denoising(200, **drawn("prefix", mode_tokens=modes))(original, epoch)
    np.testing.assert_array_equal(changed.row["segment_ids"], original["segment_ids"])
    np.testing.assert_array_equal(changed.row["positions"], original["positions"])
    end = 0
    for length in lengths:
        begin, end = end, end + length
        before, now = original["targets"][begin:end], changed.row["targets"][begin:end]
        weights = changed.row["loss_weights"][begin:end]
        if length < 2 + modes:
            np.testing.assert_array_equal(before, now)
            np.testing.assert_array_equal(weights, original["loss_weights"][begin:end])
            continue
        np.testing.assert_array_equal(now, [MODES["S"], *before[:-1]] if modes else before)
        trained = int(weights.sum())
        assert 1 <= trained <= length - modes - 1
        assert weights[length - trained :].all()
        assert changed.context[begin:end].sum() == length - trained + 1
    assert not changed.is_causal


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 50))
def test_what_is_trained_on_sees_no_more_than_its_context(lengths: list[int], epoch: int) -> None:
    """A target is neither among the inputs up to it nor in what is seen in both directions."""
    denoiser = denoising(200, causal=0, denoisers=[SpanDenoiser("R", 3, 0.3)])
    changed = denoiser(row(*lengths, padding=2), epoch)
    targets_L, context_L = changed.row["targets"], changed.context
    segments_L = changed.row["segment_ids"]
    inputs_L = shift_right(targets_L, segments_L, start_id=2)
    trained = (changed.row["loss_weights"] > 0) & ~np.isin(targets_L, SENTINELS)
    for place in np.flatnonzero(trained & np.isin(segments_L, segments_L[context_L])):
        seen = (np.arange(len(targets_L)) <= place) | context_L
        assert targets_L[place] not in inputs_L[seen & (segments_L == segments_L[place])]


def test_a_row_depends_on_seed_row_and_epoch_alone() -> None:
    span = drawn("span", denoisers=[SpanDenoiser("R", 3, 0.15)])
    denoiser, again, other = (denoising(100, seed=seed, **span) for seed in (0, 0, 1))

    def made(denoiser: Denoising, row_id: int, epoch: int) -> bytes:
        return denoiser(row(100, row_id=row_id), epoch).row["targets"].tobytes()

    rows = {(i, epoch): made(denoiser, i, epoch) for i in range(5) for epoch in range(5)}
    for (i, epoch), expected in reversed(rows.items()):
        assert made(again, i, epoch) == expected
    assert len(set(rows.values())) == len(rows)
    assert not {made(other, *key) for key in rows} & set(rows.values())
    before = row(100)
    denoiser(before, 0)
    np.testing.assert_array_equal(before["targets"], row(100)["targets"])


def test_objectives_and_denoisers_come_as_often_as_they_should() -> None:
    denoiser = denoising(128)
    rows = [denoiser(row(128, row_id=i), 0) for i in range(3000)]
    first = collections.Counter(int(x.row["targets"][0]) for x in rows)
    assert sum(x.is_causal for x in rows) / 3000 == pytest.approx(0.6, abs=0.03)
    assert first[MODES["S"]] / 3000 == pytest.approx(0.2, abs=0.03)
    assert first[MODES["R"]] / 3000 == pytest.approx(0.2 / 3, abs=0.02)
    assert first[MODES["X"]] / 3000 == pytest.approx(0.4 / 3, abs=0.02)
    assert all(x.row is not None and not x.context.any() for x in rows if x.is_causal)
    prefixes = [x.row["loss_weights"].sum() for x in rows if x.row["targets"][0] == MODES["S"]]
    assert np.mean(prefixes) == pytest.approx(127 / 2, abs=5)
    alone = denoising(128, causal=3, prefix=0, span=0)
    assert all(alone(row(128, row_id=i), 0).is_causal for i in range(100))


@pytest.mark.parametrize("denoiser", UL2_DENOISERS, ids=str)
def test_spans_are_as_long_and_as_many_as_the_denoiser_says(denoiser: SpanDenoiser) -> None:
    vocabulary = ByteVocabulary(reserved=200)
    tokens = make_row(np.full(1280, 7), np.ones(1280), np.ones(1280, int))
    objectives = Objectives(**drawn("span", denoisers=[denoiser]))
    lengths = []
    for epoch in range(40):
        changed = Denoising(objectives, vocabulary, 1280, 0)(tokens, epoch).row
        trained = changed["targets"][changed["loss_weights"] > 0]
        places = np.flatnonzero(np.isin(trained, vocabulary.sentinel_ids))
        lengths.append(np.diff(places, append=len(trained)) - 1)
        kept = np.count_nonzero(changed["targets"] == 7)
        assert sum(lengths[-1]) / kept == pytest.approx(denoiser.rate, abs=0.01)
    assert np.mean(np.concatenate(lengths)) == pytest.approx(denoiser.mean_span, rel=0.2)
    # They vary: not all spans have the mean's length.
    assert np.std(np.concatenate(lengths)) > 0.5 * denoiser.mean_span or len(lengths[0]) < 4


def test_batch_features() -> None:
    causal = denoising(20, causal=1, prefix=0, span=0)(row(20), 0)
    prefix = denoising(20, **drawn("prefix"))(row(20), 0)
    rows: list[DenoisedRow] = [causal, prefix]
    assert denoising(20, **drawn("prefix")).batch_features(rows) == {}
    both = denoising(20, teacher="causal", **drawn("prefix", bidirectional_prefix=True))
    batch = both.batch_features(rows)
    assert both.features == tuple(batch) == ("distill", "bidirectional")
    assert batch["distill"].tolist() == [1.0, 0.0]
    assert batch["distill"].dtype == np.float32
    assert not batch["bidirectional"][0].any()
    np.testing.assert_array_equal(batch["bidirectional"][1], prefix.context)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"causal": -1.0}, "weights can't be negative"),
        ({"causal": 0, "prefix": 0, "span": 0}, "one must be over 0"),
        ({"prefix": float("nan")}, "weights can't be negative"),
        ({"denoisers": ()}, "there are no denoisers"),
    ],
)
def test_objectives_refuse(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Objectives(**settings)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.0}, "rate is 1.0"),
        ({"mean_span": 0.5}, "mean_span is 0.5"),
        ({"mean_span": float("inf")}, "mean_span is inf"),
        ({"mode": "S"}, "mode is 'S'"),
    ],
)
def test_denoisers_refuse(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        dataclasses.replace(UL2_DENOISERS[0], **change)


def test_a_vocabulary_with_too_few_ids_is_refused_with_what_it_takes() -> None:
    def make(reserved: int, **objectives: Any) -> Denoising:
        return Denoising(Objectives(**objectives), ByteVocabulary(reserved=reserved), 1280, 0)

    make(163)
    with pytest.raises(InputError, match=r"need 163 reserved ids \(3 modes and 160 .* has 162"):
        make(162)
    with pytest.raises(InputError, match=r"need 3 reserved ids .* has 0"):
        make(0, span=0)
    make(0, span=0, mode_tokens=False)
    make(0, span=0, prefix=0)
    with pytest.raises(InputError, match=r"mean_span is 64 and rows have 64 tokens"):
        denoising(64)
    with pytest.raises(InputError, match=r"mean_span is 2 and rows have 4 tokens"):
        denoising(4, denoisers=[SpanDenoiser("R", 2, 0.15)])
    with pytest.raises(InputError, match="teacher_objectives is 'none'"):
        denoising(128, teacher="none")
