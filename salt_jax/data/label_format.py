"""The record format of stored soft labels (format version 2): a row's labels as bytes.

A fixed-size record has for every position of a row the teacher's K most likely ids, best first,
their log q, the log of the remaining probability, and the teacher's loss on the target.
Little-endian, L positions, b = the bits that the vocabulary's ids need:

    ids           b bits each, [L · K]: a plane of the lowest 16, 8, 4, 2 or 1 bits, then of the
                  next; b = 18 is a plane of 16 bits and one of 2. Each plane begins on a byte
    log q         [L · K] float16, or uint8 by the square-root law below
    rest          [L] float16, log q of the rest
    teacher loss  [L] float16, nats
    check         uint32, CRC-32 of the record: rows are read in any order, and comparing a shard's
                  digest would read the whole shard

The square-root law has fine steps where q is large: code c stands for log q = -32 (c / 255)²; a
step is 0.004 nats at q = 0.99, 0.044 at 0.37 and 0.14 at 5e-5.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from salt_jax.errors import InputError

ENCODINGS = ("float16", "uint8")
LEAST_K, MOST_K = 1, 1024

_LOWEST_LOG_Q = -32.0  # lower values are clipped to it in uint8
_LOG_Q_OF_CODE = (_LOWEST_LOG_Q * (np.arange(256) / 255.0) ** 2).astype(np.float16)
_CHECK_BYTES = 4


class Labels(NamedTuple):
    """Soft labels of N rows.

    Attributes:
      ids: int32[N, L, K], best first.
      log_q: float16[N, L, K], nats, of the tempered probabilities over the whole vocabulary.
      rest: float16[N, L], log of the total probability of all other ids.
      teacher_loss: float16[N, L], -log p of the target under the teacher at temperature 1, nats.
    """

    ids: np.ndarray
    log_q: np.ndarray
    rest: np.ndarray
    teacher_loss: np.ndarray

    def are_broken(self) -> np.ndarray:
        """bool[N]: which rows have non-finite values."""
        floats = (self.log_q, self.rest, self.teacher_loss)
        return np.any([~np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in floats], axis=0)


@dataclasses.dataclass(frozen=True)
class LabelFormat:
    """Encodes soft labels as records and back; L = sequence_length, K = k, and log q is stored as
    `encoding`, "float16" or "uint8"."""

    sequence_length: int
    vocab_size: int
    k: int
    encoding: str = "float16"

    def __post_init__(self) -> None:
        if not LEAST_K <= self.k <= min(MOST_K, self.vocab_size):
            raise InputError(
                f"soft_labels is {self.k}, expected {LEAST_K} to "
                f"{min(MOST_K, self.vocab_size)} ids a position."
            )
        if self.encoding not in ENCODINGS:
            raise InputError(
                f"soft_label_encoding is {self.encoding!r}, expected one of {', '.join(ENCODINGS)}."
            )

    @functools.cached_property
    def record(self) -> np.dtype:
        """A record as a NumPy structured type."""
        length, values = self.sequence_length, self.sequence_length * self.k
        log_q = "<f2" if self.encoding == "float16" else "u1"
        return np.dtype(
            [
                *((name, "u1", -(-values * width // 8)) for name, _, width in self._planes()),
                ("log_q", log_q, (length, self.k)),
                *(("rest", "<f2", (length,)), ("teacher_loss", "<f2", (length,)), ("check", "<u4")),
            ]
        )

    @property
    def id_bits(self) -> int:
        """b, the bits of an id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def record_bytes(self) -> int:
        """Bytes a row."""
        return self.record.itemsize

    @property
    def bytes_per_token(self) -> float:
        """Bytes per position, without the row's check."""
        return (self.record_bytes - _CHECK_BYTES) / self.sequence_length

    def encode(self, labels: Labels) -> np.ndarray:
        """uint8[N, record_bytes]."""
        rows = labels.ids.shape[0]
        shape = (rows, self.sequence_length, self.k)
        assert labels.ids.shape == labels.log_q.shape == shape, (
            f"soft labels of {labels.ids.shape} and {labels.log_q.shape}, expected {shape}"
        )
        records = np.zeros(rows, self.record)
        ids_NxP = labels.ids.reshape(rows, self.sequence_length * self.k).astype(np.uint32)
        for name, shift, width in self._planes():
            records[name] = _packed(ids_NxP >> shift, width)
        log_q = labels.log_q
        if self.encoding == "uint8":
            share = np.clip(log_q.astype(np.float32) / _LOWEST_LOG_Q, 0.0, 1.0)
            log_q = np.rint(255.0 * np.sqrt(share)).astype(np.uint8)
        records["log_q"], records["rest"] = log_q, labels.rest
        records["teacher_loss"] = labels.teacher_loss
        records["check"] = _checks(records)
        return records.view(np.uint8).reshape(rows, self.record_bytes)

    def damaged(self, records: np.ndarray) -> np.ndarray:
        """bool[N]: which of uint8[N, record_bytes] fail their CRC."""
        found = np.ascontiguousarray(records).view(self.record)[:, 0]
        return found["check"] != _checks(found)

    def decode(self, records: np.ndarray) -> Labels:
        """The labels of uint8[N, record_bytes]."""
        found = np.ascontiguousarray(records).view(self.record)[:, 0]
        ids_NxP = np.zeros((len(found), self.sequence_length * self.k), np.int32)
        for name, shift, width in self._planes():
            ids_NxP |= _unpacked(found[name], width, ids_NxP.shape[1]).astype(np.int32) << shift
        floats = [found[name].copy() for name in ("log_q", "rest", "teacher_loss")]
        if self.encoding == "uint8":
            floats[0] = _LOG_Q_OF_CODE[floats[0]]
        return Labels(ids_NxP.reshape(floats[0].shape), *floats)

    def _planes(self) -> Iterator[tuple[str, int, int]]:
        """(name, shift, width) of the planes that hold an id, the lowest bits first."""
        shift = 0
        for width in (16, 8, 4, 2, 1):
            while self.id_bits - shift >= width:
                yield f"ids_{shift}", shift, width
                shift += width


def _packed(values_NxP: np.ndarray, width: int) -> np.ndarray:
    """uint8[N, ⌈P · width / 8⌉] of the lowest `width` bits of each value."""
    if width >= 8:
        rows, count = values_NxP.shape
        return values_NxP.astype(f"<u{width // 8}").view(np.uint8).reshape(rows, count * width // 8)
    bits = (values_NxP[:, :, None] >> np.arange(width, dtype=np.uint32)) & 1
    return np.packbits(
        bits.astype(np.uint8).reshape(len(bits), bits.shape[1] * width), axis=1, bitorder="little"
    )


def _unpacked(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    if width >= 8:
        return np.ascontiguousarray(packed).view(f"<u{width // 8}")
    shifts = width * np.arange(8 // width, dtype=np.uint8)
    values = (packed[:, :, None] >> shifts) & np.uint8((1 << width) - 1)
    return values.reshape(len(packed), packed.shape[1] * len(shifts))[:, :count]


def _checks(records: np.ndarray) -> np.ndarray:
    """uint32[N], CRC-32 of each record without its check."""
    return np.array([zlib.crc32(one.tobytes()[:-_CHECK_BYTES]) for one in records], np.uint32)
