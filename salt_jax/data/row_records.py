"""The record format of the packed cache (format version 1): a packed row as bytes.

Little-endian, S segments, L tokens:

    u16 subset | u16 S | u32[S] segment lengths | u8[⌈L/8⌉] loss weights as bits | u16[L] targets

Targets take 32 bits if the vocabulary's ids need them. Segments are contiguous from position 0; the
rest is padding. Segment ids and positions follow from the lengths, the row id from the record's
place.
"""

import dataclasses

import numpy as np

from salt_jax.data.features import Row, make_row
from salt_jax.errors import InputError

LARGEST_SUBSET = 2**16 - 1  # a row's subset is an index up to this


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """Encodes rows of L tokens as records and back."""

    sequence_length: int
    vocabulary_size: int

    @property
    def target_dtype(self) -> np.dtype:
        """The type of a stored token id."""
        return np.dtype("<u2" if self.vocabulary_size <= 2**16 else "<u4")

    def encode(self, row: Row) -> bytes:
        """The row's record. Its segment ids must be 1, 2, … in runs from position 0, then 0."""
        segment_ids_L = row["segment_ids"]
        targets_L = row["targets"]
        assert targets_L.shape == segment_ids_L.shape == (self.sequence_length,), (
            f"a row of {targets_L.shape} targets, expected {self.sequence_length}"
        )
        lengths_S = np.bincount(segment_ids_L)[1:]
        in_order_L = np.repeat(np.arange(1, len(lengths_S) + 1), lengths_S)
        assert np.array_equal(segment_ids_L[: len(in_order_L)], in_order_L), (
            f"segments must be numbered 1, 2, … from position 0, got {segment_ids_L}"
        )
        assert np.all((targets_L >= 0) & (targets_L < self.vocabulary_size)), (
            f"targets outside a vocabulary of {self.vocabulary_size} ids"
        )
        return b"".join(
            (
                np.array([row["subset"], len(lengths_S)], "<u2").tobytes(),
                lengths_S.astype("<u4").tobytes(),
                np.packbits(row["loss_weights"] > 0).tobytes(),
                targets_L.astype(self.target_dtype).tobytes(),
            )
        )

    def decode(self, record: bytes, row_id: int) -> Row:
        """The row of a record; InputError if it is malformed."""
        length, at = self.sequence_length, 4
        subset, num_segments = np.frombuffer(record.ljust(at, b"\0"), "<u2", count=2)
        other_bytes = -(-length // 8) + length * self.target_dtype.itemsize
        if len(record) != at + 4 * int(num_segments) + other_bytes:
            raise self._damage(row_id)
        lengths_S = np.frombuffer(record, "<u4", count=num_segments, offset=at)
        at += lengths_S.nbytes
        bits = np.frombuffer(record, np.uint8, count=-(-length // 8), offset=at)
        at += bits.nbytes
        targets_L = np.frombuffer(record, self.target_dtype, count=length, offset=at)
        # Bad lengths could claim gigabytes, and a bad id would read a wrong embedding.
        if lengths_S.sum(dtype=np.int64) > length or targets_L.max() >= self.vocabulary_size:
            raise self._damage(row_id)
        segment_ids_L = np.zeros(length, np.int32)
        ids_of_tokens = np.repeat(np.arange(1, num_segments + 1, dtype=np.int32), lengths_S)
        segment_ids_L[: len(ids_of_tokens)] = ids_of_tokens
        return make_row(
            targets_L=targets_L,
            loss_weights_L=np.unpackbits(bits, count=length),
            segment_ids_L=segment_ids_L,
            subset=int(subset),
            row_id=row_id,
        )

    def _damage(self, row_id: int) -> InputError:
        return InputError(
            f"Row {row_id} of the cache is damaged: copy the cache again, or make it again with "
            "`salt prepare`."
        )
