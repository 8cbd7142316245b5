"""Checkpoints a part at a time: Orbax reads what is written, and what Orbax writes is read."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.training import converted_checkpoints
from salt_jax.training.checkpoints import complete_steps, read_progress
from salt_jax.training.converted_checkpoints import open_parameters, save_streamed

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
PROGRESS = {"model": {"num_layers": 2}, "vocabulary_fingerprint": "abc", "counters": {}}


@dataclasses.dataclass
class Recorded:
    """A parameter that keeps which rows were asked for."""

    values: np.ndarray
    asked: list[slice] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        self.asked.append(rows)
        return self.values[rows]


def some_parameters(shapes: list[tuple[int, ...]]) -> dict[tuple[str, ...], np.ndarray]:
    """Of all dtypes; the first is all zeros, as a bias may be."""
    rng = np.random.default_rng(0)
    found = {
        ("layers", f"p{number}", "kernel"): rng.standard_normal(shape).astype(
            DTYPES[number % len(DTYPES)]
        )
        for number, shape in enumerate(shapes)
    }
    next(iter(found.values()))[:] = 0
    return found


@settings(max_examples=12, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=3), chunk_values=st.integers(1, 60))
def test_orbax_reads_what_is_written_in_parts(
    shapes: list[tuple[int, ...]], chunk_values: int
) -> None:
    expected = some_parameters(shapes)
    recorded = {path: Recorded(values) for path, values in expected.items()}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted_checkpoints, "_CHUNK_BYTES", 4 * chunk_values)
        run = pathlib.Path(name)
        save_streamed(run, 7, recorded, PROGRESS)
        assert complete_steps(run) == [7]
        assert read_progress(run, 7) == PROGRESS
        tree = traverse_util.unflatten_dict(expected)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(run / "checkpoints/7/params", abstract)
        jax.tree.map(np.testing.assert_array_equal, restored, tree)
        opened = open_parameters(run, 7, expected)
        for path, values in expected.items():
            assert (opened[path].shape, opened[path].dtype) == (values.shape, values.dtype)
            for row in reversed(range(len(values))):
                np.testing.assert_array_equal(
                    opened[path].read(slice(row, row + 1)), values[row : row + 1]
                )
    for path, parameter in recorded.items():
        rows_at_once = [rows.stop - rows.start for rows in parameter.asked]
        assert sum(rows_at_once) == len(expected[path]), "each row is made once"
        row_bytes = expected[path][:1].nbytes
        assert max(rows_at_once) == 1 or max(rows_at_once) * row_bytes <= 4 * chunk_values


@pytest.mark.parametrize("chunk_byte_size", [None, 64])
def test_what_a_run_saved_is_read_in_parts(
    chunk_byte_size: int | None, tmp_path: pathlib.Path
) -> None:
    """OCDBT, which a training run writes, whole or cut."""
    expected = some_parameters([(5, 3, 4), (6, 2), (7,)])
    tree = jax.tree.map(jax.numpy.asarray, traverse_util.unflatten_dict(expected))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_byte_size), tree)
    with ocp.StandardCheckpointer() as checkpointer:
        folder = tmp_path / "checkpoints/3/params"
        checkpointer.save(folder, tree, save_args=save_args)
        checkpointer.wait_until_finished()
    opened = open_parameters(tmp_path, 3, expected)
    for path, values in expected.items():
        np.testing.assert_array_equal(opened[path].read(), values)
        np.testing.assert_array_equal(opened[path].read(slice(1, 4)), values[1:4])
        np.testing.assert_array_equal(opened[path].read(slice(2, 3)), values[2:3])
        np.testing.assert_array_equal(opened[path].read(slice(-1, None)), values[-1:])


def test_a_part_that_is_lost_is_no_zero(tmp_path: pathlib.Path) -> None:
    expected = some_parameters([(2, 3), (4,)])
    recorded = {path: Recorded(values) for path, values in expected.items()}
    save_streamed(tmp_path, 0, recorded, PROGRESS)
    (tmp_path / "checkpoints/0/params/layers.p1.kernel/0").unlink()
    opened = open_parameters(tmp_path, 0, expected)
    opened["layers", "p0", "kernel"].read()
    with pytest.raises(ValueError, match="missing"):
        opened["layers", "p1", "kernel"].read()


def test_what_cannot_be_made_leaves_no_step(tmp_path: pathlib.Path) -> None:
    class Fails(Recorded):
        def read(self, rows: slice = slice(None)) -> np.ndarray:
            raise OSError(5, "the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        save_streamed(tmp_path, 0, {("head",): Fails(np.zeros(3))}, PROGRESS)
    assert complete_steps(tmp_path) == []
