"""Which rows are read, on one process and on several, through restarts and other batch sizes."""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.data.denoisers import Denoising, Objectives, SpanDenoiser
from salt_jax.data.input_pipeline import SELECTED, InputPipeline, Position, in_order
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_order import Draw, MixedOrder, Order, RowOrder, UnusedRows
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError

SELECTED_IDS = np.array([3, 5, 8, 13, 21])


def pipeline(cache: PackedCache, process: int = 0, processes: int = 1) -> InputPipeline:
    split = cache.split("train")
    return InputPipeline(
        sources={"cache": split},
        batch_size=8,
        start_id=cache.start_id,
        all_rows=RowOrder(None, len(split), seed=0),
        selected_rows=RowOrder(SELECTED_IDS, 0, seed=0),
        stage1_steps=2,
        part=process,
        parts=processes,
    )


def ids(rows: InputPipeline, step: int) -> list[int]:
    return [draw.row_id for draw in rows.draws(step)]


def test_stage_1_reads_the_selected_order(cache: PackedCache) -> None:
    rows = pipeline(cache)
    assert set(ids(rows, 0) + ids(rows, 1)) == set(SELECTED_IDS)
    order = RowOrder(None, 48, seed=0)
    assert rows.draws(2) == [order[i] for i in range(16, 24)]


AUDITED = settings(deadline=None, max_examples=20)  # Grain's shuffle of a few rows takes long

# A run is started again and again: (steps until then, batch size over 4, processes).
LIVES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 3), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=5,
)


def read_over_lives(start: InputPipeline, lives: list[tuple[int, int, int]]) -> list[list[Draw]]:
    """What all processes together read at each step; `start` has a batch size of its own."""
    position, steps = Position(), []
    for more, batch, processes in lives:
        parts = [
            dataclasses.replace(
                start,
                batch_size=4 * batch,
                start=position,
                part=process,
                parts=processes,
            )
            for process in range(processes)
        ]
        for step in range(position.step, position.step + more):
            steps.append([draw for part in parts for draw in part.draws(step)])
            assert len(steps[-1]) == 4 * batch
        position = parts[0].position(position.step + more)
        assert position.rows == sum(map(len, steps))
    return steps


def assert_once_an_epoch(draws: list[Draw], sizes: dict[int, list[int]]) -> None:
    """Of each source, each row once in each whole epoch and at most once in the last."""
    for source, row_ids in sizes.items():
        epochs = collections.defaultdict(list)
        for draw in draws:
            if draw.source == source:
                epochs[draw.epoch].append(draw.row_id)
        assert sorted(epochs) == list(range(len(epochs)))
        for epoch, read in epochs.items():
            assert len(set(read)) == len(read)
            assert set(read) <= set(row_ids)
            assert len(read) == len(row_ids) or epoch == len(epochs) - 1


@AUDITED
@given(LIVES, st.integers(0, 8), st.lists(st.integers(8, 40), min_size=1, max_size=3))
def test_each_row_once_an_epoch_through_restarts(
    lives: list[tuple[int, int, int]], stage1_steps: int, sizes: list[int]
) -> None:
    """On 1, 2 and 4 hosts, with batch sizes that change, from one cache or three."""
    orders = [RowOrder(None, size, seed=5, source=i) for i, size in enumerate(sizes)]
    all_rows: Order = orders[0] if len(orders) == 1 else MixedOrder(orders, [3, 1, 2][: len(sizes)])
    rows = InputPipeline(dict.fromkeys("abc"), 4, 0, all_rows, stage1_steps=stage1_steps)
    read = [draw for step in read_over_lives(rows, lives) for draw in step]
    assert read == [all_rows[position] for position in range(len(read))]
    assert_once_an_epoch(read, {i: list(range(size)) for i, size in enumerate(sizes)})


@AUDITED
@given(LIVES, st.integers(0, 8), st.booleans())
def test_each_row_once_an_epoch_and_stage(
    lives: list[tuple[int, int, int]], stage1_steps: int, unused: bool
) -> None:
    """SALT_DS: stage 1 from 11 selected rows of 30, stage 2 from all or from those left."""
    chosen = np.arange(0, 30, 3)[:11]
    all_rows, selected = RowOrder(None, 30, seed=2), RowOrder(chosen, 0, seed=2)
    left = RowOrder(UnusedRows(30, chosen), 0, seed=2) if unused else None
    rows = InputPipeline(
        {"a": None}, 4, 0, all_rows, selected, unused_rows=left, stage1_steps=stage1_steps
    )
    steps = read_over_lives(rows, lives)
    stage1 = [draw for step in steps[:stage1_steps] for draw in step]
    stage2 = [draw for step in steps[stage1_steps:] for draw in step]
    assert stage1 == [selected[position] for position in range(len(stage1))]
    assert_once_an_epoch(stage1, {0: chosen.tolist()})
    if left is not None:
        assert stage2 == [left[position] for position in range(len(stage2))]
        assert_once_an_epoch(stage2, {0: [i for i in range(30) if i not in chosen]})
    else:
        end = len(stage1) + len(stage2)
        assert stage2 == [all_rows[position] for position in range(len(stage1), end)]


def test_epochs_count_what_was_read(cache: PackedCache) -> None:
    rows = pipeline(cache)
    assert rows.epochs(1) == {"cache": 0.0, SELECTED: 8 / 5}
    assert rows.epochs(8) == {"cache": 1.0, SELECTED: 16 / 5}
    left = RowOrder(UnusedRows(48, SELECTED_IDS), 0, seed=0)
    unused = dataclasses.replace(rows, unused_rows=left)
    assert unused.epochs(8) == {"cache": 48 / 43, SELECTED: 16 / 5}
    late = dataclasses.replace(rows, selected_rows=None, start=Position(9, 3, 45))
    assert late.epochs(9) == {"cache": 1.0}
    with pytest.raises(AssertionError, match="from step 9"):
        late.draws(8)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(cache: PackedCache, processes: int) -> None:
    for step in (0, 2, 9):
        parts = [pipeline(cache, p, processes).draws(step) for p in range(processes)]
        assert sum(parts, []) == pipeline(cache).draws(step)  # noqa: RUF017


def test_batches_are_those_of_the_steps(cache: PackedCache) -> None:
    rows = pipeline(cache)
    for step, batch in zip(range(1, 5), rows.batches(1, 5), strict=True):
        assert batch["row_id"].tolist() == ids(rows, step)
        np.testing.assert_array_equal(batch["targets"], rows.batch(step)["targets"])
    assert list(rows.batches(5, 5)) == []


def test_a_mixtures_rows_come_from_their_caches(
    cache: PackedCache, make_cache: Callable[..., PackedCache]
) -> None:
    splits = {"a": cache.split("train"), "b": make_cache(rows=20, seed=4).split("train")}
    orders = [RowOrder(None, len(split), 0, i) for i, split in enumerate(splits.values())]
    rows = InputPipeline(splits, 12, cache.start_id, MixedOrder(orders, [2, 1]))
    batch = rows.batch(3)
    assert collections.Counter(draw.source for draw in rows.draws(3)) == {0: 8, 1: 4}
    for i, draw in enumerate(rows.draws(3)):
        row = list(splits.values())[draw.source][draw.row_id]
        np.testing.assert_array_equal(batch["targets"][i], row["targets"])
    assert rows.epochs(5) == {"a": 40 / 48, "b": 1.0}


def test_denoised_batches_are_the_same_in_any_thread_and_process(cache: PackedCache) -> None:
    short = Objectives(denoisers=[SpanDenoiser("R", 2, 0.2), SpanDenoiser("X", 2, 0.5)])
    denoising = Denoising(short, ByteVocabulary(reserved=12), 16, 0, "causal")
    rows = dataclasses.replace(pipeline(cache), denoising=denoising, read_threads=4)
    assert rows.extra_features == ("distill",)
    whole = list(rows.batches(0, 12))
    parts = [list(dataclasses.replace(rows, part=i, parts=4).batches(0, 12)) for i in range(4)]
    for step, batch in enumerate(whole):
        for name in batch:
            split = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(batch[name], split)
    # Of 96 rows some stayed as they are, and those are today's.
    for step, batch in enumerate(whole):
        plain = dataclasses.replace(rows, denoising=None).batch(step)
        causal_B = batch["distill"] == 1
        np.testing.assert_array_equal(batch["inputs"][causal_B], plain["inputs"][causal_B])
        np.testing.assert_array_equal(plain["row_id"], batch["row_id"])
    shares = np.concatenate([batch["distill"] for batch in whole])
    assert 0.4 < shares.mean() < 0.8
    # The five selected rows come again and again, each time otherwise.
    first, second = whole[0], whole[1]
    again = [
        (i, j) for i in range(8) for j in range(8) if first["row_id"][i] == second["row_id"][j]
    ]
    assert any((first["targets"][i] != second["targets"][j]).any() for i, j in again)


def test_in_order_fills_up_the_last_batch(cache: PackedCache) -> None:
    batches = list(in_order(cache.split("validation"), 4, cache.start_id))
    row_ids = np.concatenate([b["row_id"] for b in batches])
    assert row_ids.tolist() == [*range(10), -1, -1]
    assert all(len(b["targets"]) == 4 for b in batches)
    assert batches[-1]["loss_weights"][2:].sum() == 0
    assert batches[-1]["loss_weights"][:2].sum() > 0
    assert [len(b["row_id"]) for b in in_order(cache.split("validation"), 4, 0, rows=5)] == [4, 4]


def test_settings_that_do_not_fit_are_refused(cache: PackedCache) -> None:
    with pytest.raises(InputError, match="not divisible by 3 processes"):
        pipeline(cache, 0, 3)
    with pytest.raises(InputError, match="read_threads is 0"):
        dataclasses.replace(pipeline(cache), read_threads=0)
