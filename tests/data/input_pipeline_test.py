"""Orders of rows and batches, on one process and on several."""

import numpy as np
import pytest

from salt_jax.data.input_pipeline import InputPipeline, RowOrder, in_order
from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import InputError


def pipeline(cache: PackedCache, process: int = 0, processes: int = 1) -> InputPipeline:
    split = cache.split("train")
    return InputPipeline(
        split=split,
        batch_size=8,
        start_id=cache.start_id,
        all_rows=RowOrder(None, len(split), seed=0),
        selected_rows=RowOrder(np.array([3, 5, 8, 13, 21]), 0, seed=0),
        stage1_steps=2,
        process_index=process,
        process_count=processes,
    )


def test_every_row_once_an_epoch_and_epochs_differ(cache: PackedCache) -> None:
    order = RowOrder(None, 48, seed=0)
    epochs = [[order[e * 48 + i] for i in range(48)] for e in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [RowOrder(None, 48, seed=1)[i] for i in range(48)] != epochs[0]
    assert epochs[0] != list(range(48))


def test_stage_1_reads_the_selected_order(cache: PackedCache) -> None:
    rows = pipeline(cache)
    stage1 = rows.row_ids(0) + rows.row_ids(1)
    assert set(stage1) == {3, 5, 8, 13, 21}
    order = RowOrder(None, 48, seed=0)
    assert rows.row_ids(2) == [order[i] for i in range(16, 24)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(cache: PackedCache, processes: int) -> None:
    for step in (0, 2, 9):
        parts = [pipeline(cache, p, processes).row_ids(step) for p in range(processes)]
        assert sum(parts, []) == pipeline(cache).row_ids(step)  # noqa: RUF017


def test_batches_are_those_of_the_steps(cache: PackedCache) -> None:
    rows = pipeline(cache)
    for step, batch in zip(range(1, 5), rows.batches(1, 5), strict=True):
        assert batch["row_id"].tolist() == rows.row_ids(step)
        np.testing.assert_array_equal(batch["targets"], rows.batch(step)["targets"])
    assert list(rows.batches(5, 5)) == []


def test_in_order_fills_up_the_last_batch(cache: PackedCache) -> None:
    batches = list(in_order(cache.split("validation"), 4, cache.start_id))
    ids = np.concatenate([b["row_id"] for b in batches])
    assert ids.tolist() == [*range(10), -1, -1]
    assert all(len(b["targets"]) == 4 for b in batches)
    assert batches[-1]["loss_weights"][2:].sum() == 0
    assert batches[-1]["loss_weights"][:2].sum() > 0
    assert [len(b["row_id"]) for b in in_order(cache.split("validation"), 4, 0, rows=5)] == [4, 4]


def test_batch_must_divide_by_processes(cache: PackedCache) -> None:

    with pytest.raises(InputError, match="not divisible by 3 processes"):
        pipeline(cache, 0, 3)
