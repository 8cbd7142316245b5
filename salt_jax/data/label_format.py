"""A row's soft labels as bytes: the record format of stored soft labels (format version 2).

A record of fixed size has for every position of a row the teacher's K most likely ids, best first,
their log q, the log q of all other ids together, and the teacher's loss on the truth.
Little-endian, L positions, b = the bits that the vocabulary's ids need:

    ids           b bits each, [L · K]: a plane of the lowest 16, 8, 4, 2 or 1 bits, then of the
                  next; b = 18 is a plane of 16 bits and one of 2. Each plane begins on a byte
    log q         [L · K] float16, or uint8 by the square-root law below
    rest          [L] float16, log q of the rest
    teacher loss  [L] float16, nats
    check         uint32, CRC-32 of all of it: rows are read in any order, so that comparing a
                  shard's digest would read far more than is asked for

The square-root law is fine where q is large and coarse where it matters little: code c stands for
log q = -32 (c / 255)²; its step is 0.004 nats at q = 0.99, 0.044 at 0.37 and 0.14 at 5e-5.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from salt_jax.errors import InputError

ENCODINGS = ("float16", "uint8")
LEAST_K, MOST_K = 1, 1024

_LOWEST_LOG_Q = -32.0  # uint8; what is less likely counts as this
_CHECK_BYTES = 4


class Labels(NamedTuple):
    """Soft labels of N rows.

    Attributes:
      ids: int32[N, L, K], best first.
      log_q: float16[N, L, K], nats, of the tempered probabilities over the whole vocabulary.
      rest: float16[N, L], log of what all other ids have together.
      teacher_loss: float16[N, L], -log p of the truth under the teacher at temperature 1, nats.
    """

    ids: np.ndarray
    log_q: np.ndarray
    rest: np.ndarray
    teacher_loss: np.ndarray

    def are_broken(self) -> np.ndarray:
        """bool[N]: which rows have a number that is not finite."""
        floats = (self.log_q, self.rest, self.teacher_loss)
        return np.any([~np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in floats], axis=0)


@dataclasses.dataclass(frozen=True)
class LabelFormat:
    """Turns soft labels into records and back.

    Attributes:
      sequence_length: L.
      vocab_size: All ids.
      k: K, ids a position.
      encoding: Of log q: "float16" or "uint8".
    """

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

    @property
    def id_bits(self) -> int:
        """b, the bits of an id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def record_bytes(self) -> int:
        """Bytes a row."""
        return self._label_bytes + _CHECK_BYTES

    @property
    def bytes_per_token(self) -> float:
        """What a position costs on disk, its row's check aside."""
        return self._label_bytes / self.sequence_length

    @property
    def _label_bytes(self) -> int:
        values = self.sequence_length * self.k
        planes = sum(-(-values * width // 8) for _, width in _planes(self.id_bits))
        return planes + values * (2 if self.encoding == "float16" else 1) + 4 * self.sequence_length

    def encode(self, labels: Labels) -> np.ndarray:
        """uint8[N, record_bytes]."""
        rows = labels.ids.shape[0]
        shape = (rows, self.sequence_length, self.k)
        assert labels.ids.shape == labels.log_q.shape == shape, (
            f"soft labels of {labels.ids.shape} and {labels.log_q.shape}, expected {shape}"
        )
        ids_NxP = labels.ids.reshape(rows, self.sequence_length * self.k).astype(np.uint32)
        parts = [_packed(ids_NxP >> shift, width) for shift, width in _planes(self.id_bits)]
        log_q_NxP = labels.log_q.reshape(rows, self.sequence_length * self.k)
        if self.encoding == "float16":
            parts.append(_bytes(log_q_NxP.astype("<f2")))
        else:
            share_NxP = np.clip(log_q_NxP.astype(np.float32) / _LOWEST_LOG_Q, 0.0, 1.0)
            parts.append(np.rint(255.0 * np.sqrt(share_NxP)).astype(np.uint8))
        parts += [_bytes(x.astype("<f2")) for x in (labels.rest, labels.teacher_loss)]
        body = np.concatenate(parts, axis=1)
        return np.concatenate([body, _checks(body)], axis=1)

    def damaged(self, records: np.ndarray) -> np.ndarray:
        """bool[N]: which of uint8[N, record_bytes] are not as `encode` made them."""
        bodies, checks = np.split(records, [self._label_bytes], axis=1)
        return np.any(_checks(bodies) != checks, axis=1)

    def decode(self, records: np.ndarray) -> Labels:
        """The labels of uint8[N, record_bytes]."""
        rows, values, at = records.shape[0], self.sequence_length * self.k, 0

        def take(size: int) -> np.ndarray:
            nonlocal at
            at += size
            return np.ascontiguousarray(records[:, at - size : at])

        ids_NxP = np.zeros((rows, values), np.int32)
        for shift, width in _planes(self.id_bits):
            plane_NxP = _unpacked(take(-(-values * width // 8)), width, values)
            ids_NxP |= plane_NxP.astype(np.int32) << shift
        if self.encoding == "float16":
            log_q_NxP = take(2 * values).view("<f2")
        else:
            log_q_NxP = _LOG_Q_OF_CODE[take(values)]
        rest_NxL, loss_NxL = (take(2 * self.sequence_length).view("<f2") for _ in range(2))
        shape = (rows, self.sequence_length, self.k)
        return Labels(ids_NxP.reshape(shape), log_q_NxP.reshape(shape), rest_NxL, loss_NxL)


_LOG_Q_OF_CODE = (_LOWEST_LOG_Q * (np.arange(256) / 255.0) ** 2).astype(np.float16)


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """(shift, width) of the planes that hold `bits` bits, the lowest bits first."""
    shift = 0
    for width in (16, 8, 4, 2, 1):
        while bits - shift >= width:
            yield shift, width
            shift += width


def _packed(values_NxP: np.ndarray, width: int) -> np.ndarray:
    """uint8[N, ⌈P · width / 8⌉] of the lowest `width` bits of each value."""
    values_NxP = values_NxP & ((1 << width) - 1)
    if width == 16:
        return _bytes(values_NxP.astype("<u2"))
    per_byte = 8 // width
    rows, count = values_NxP.shape
    size = -(-count // per_byte)
    small_NxP = np.pad(values_NxP.astype(np.uint8), ((0, 0), (0, size * per_byte - count)))
    groups = small_NxP.reshape(rows, size, per_byte)
    shifted = groups << (width * np.arange(per_byte, dtype=np.uint8))
    return np.bitwise_or.reduce(shifted, axis=2)


def _unpacked(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    if width == 16:
        return packed.view("<u2")
    shifts = width * np.arange(8 // width, dtype=np.uint8)
    values = (packed[:, :, None] >> shifts) & np.uint8((1 << width) - 1)
    return values.reshape(len(packed), packed.shape[1] * len(shifts))[:, :count]


def _checks(bodies: np.ndarray) -> np.ndarray:
    """uint8[N, 4], CRC-32 of uint8[N, …]."""
    return _bytes(np.array([zlib.crc32(body.tobytes()) for body in bodies], "<u4")[:, None])


def _bytes(array: np.ndarray) -> np.ndarray:
    """uint8[N, …] of the bytes of each row."""
    rows, count = array.shape
    return np.ascontiguousarray(array).view(np.uint8).reshape(rows, count * array.itemsize)
