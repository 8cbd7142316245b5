"""The features of a packed row and of a batch of rows.

No token id is special: padding is segment 0, and tokens that are trained on have loss weight.

A row (L = sequence length) packed from the documents [7 8 1] and [9 1], L = 6, EOS 1, padding 0:

    targets       7  8  1  9  1  0    int32[L]
    loss_weights  1  1  1  1  1  0    float32[L], 0 or 1
    segment_ids   1  1  1  2  2  0    int32[L], 0 = padding, 1.. in order of appearance
    positions     0  1  2  0  1  0    int32[L], restart at each segment
    subset        0                   int32, index in the cache's subset names
    row_id        41                  int64, index of the row in its split

A batch stacks B rows and adds the model's inputs, here with start id 2:

    inputs        2  7  8  2  9  2    int32[B, L], targets shifted right inside each segment
"""

from collections.abc import Mapping, Sequence

import numpy as np

Row = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

ROW_DTYPES: Mapping[str, type[np.generic]] = {
    "targets": np.int32,
    "loss_weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "subset": np.int32,
    "row_id": np.int64,
}


def shift_right(targets_BxL: np.ndarray, segment_ids_BxL: np.ndarray, start_id: int) -> np.ndarray:
    """The model's inputs: each target's predecessor, and `start_id` where a segment begins. Any
    number of leading dimensions."""
    inputs_BxL = np.roll(targets_BxL, 1, axis=-1)
    inputs_BxL[np.diff(segment_ids_BxL, prepend=-1) != 0] = start_id
    return inputs_BxL


def segment_positions(segment_ids_L: np.ndarray) -> np.ndarray:
    """Positions int32[L] inside each segment, from 0; padding counts as a segment of its own."""
    begins_L = np.diff(segment_ids_L, prepend=-1) != 0
    index_L = np.arange(len(segment_ids_L), dtype=np.int32)
    return index_L - np.maximum.accumulate(np.where(begins_L, index_L, 0)).astype(np.int32)


def make_row(
    targets_L: np.ndarray,
    loss_weights_L: np.ndarray,
    segment_ids_L: np.ndarray,
    subset: int = 0,
    row_id: int = 0,
) -> Row:
    """A row with its positions, cast to ROW_DTYPES."""
    return {
        "targets": np.asarray(targets_L, np.int32),
        "loss_weights": np.asarray(loss_weights_L, np.float32),
        "segment_ids": np.asarray(segment_ids_L, np.int32),
        "positions": segment_positions(np.asarray(segment_ids_L)),
        "subset": np.asarray(subset, np.int32),
        "row_id": np.asarray(row_id, np.int64),
    }


def make_batch(rows: Sequence[Row], start_id: int) -> Batch:
    """Rows stacked along a first dimension B, with `inputs` added."""
    batch = {name: np.stack([row[name] for row in rows]) for name in ROW_DTYPES}
    batch["inputs"] = shift_right(batch["targets"], batch["segment_ids"], start_id)
    return batch
