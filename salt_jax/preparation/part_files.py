"""Part files: a unit's tokenized documents, grouped by bucket.

Documents are written in blocks. A block's documents of one bucket are contiguous, a *slice*: D
records (36 bytes each), then their tokens. The file ends with an index of all slices by bucket, so
that reading a bucket takes one look-up and one read per block. Little-endian:

    slice …                      D × RECORD | T × token (u16, or u32)
    index of slices, by bucket   _RUN each
    u64[buckets + 1]             where each bucket's part of the index begins

Writing holds one block in memory, reading one slice.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

# The target size of a slice in bytes, which determines that of a block.
_SLICE_BYTES = 64 * 1024
_LEAST_BLOCK_BYTES = 4 * 1024 * 1024

RECORD = np.dtype(
    [
        ("digest", "S16"),
        ("text_bytes", "<u8"),
        ("tokens", "<u4"),
        ("prompt_tokens", "<u4"),
        ("subset", "<u4"),
    ]
)
_RUN = np.dtype([("offset", "<u8"), ("documents", "<u8"), ("tokens", "<u8")])


class TokenizedDocument(NamedTuple):
    """A document of a unit.

    Attributes:
      tokens: int[T], its token ids, the end of document included.
      split, subset: Their names.
      digest: 16 bytes that identify its text, the prompt included.
      text_bytes: UTF-8 bytes of its text, the prompt excluded.
      prompt_tokens: How many tokens at its start are a prompt, which is masked out of the loss.
    """

    tokens: np.ndarray
    split: str
    subset: str
    digest: bytes
    text_bytes: int
    prompt_tokens: int = 0


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The dtype of tokens in a part file."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


class PartWriter:
    """Writes a part file to an empty, open `file`; `dtype` is that of tokens."""

    def __init__(self, file: BinaryIO, buckets: int, dtype: np.dtype):
        self._file = file
        self._buckets = buckets
        self._dtype = dtype
        self._block_limit = max(_LEAST_BLOCK_BYTES, _SLICE_BYTES * buckets)
        self._runs: list[tuple[int, int, int, int]] = []  # bucket, and a _RUN
        self._clear()

    def add(self, bucket: int, document: TokenizedDocument, subset: int) -> None:
        """Adds a document to a bucket; `subset` is the index of its subset's name."""
        records, tokens = self._block.setdefault(bucket, ([], []))
        tokens.append(document.tokens.astype(self._dtype))
        size, prompt = len(document.tokens), document.prompt_tokens
        records.append((document.digest, document.text_bytes, size, prompt, subset))
        self._block_bytes += RECORD.itemsize + tokens[-1].nbytes
        if self._block_bytes >= self._block_limit:
            self._write_block()

    def finish(self) -> None:
        """Writes the last block and the index."""
        self._write_block()
        bucket_R = np.array([bucket for bucket, *_ in self._runs], np.int64)
        runs = np.array([tuple(run) for _, *run in self._runs], _RUN)
        order_R = np.argsort(bucket_R, kind="stable")
        self._file.write(runs[order_R].tobytes())
        starts = np.searchsorted(bucket_R[order_R], np.arange(self._buckets + 1))
        self._file.write(starts.astype("<u8").tobytes())

    def _write_block(self) -> None:
        for bucket, (records, tokens) in sorted(self._block.items()):
            self._runs.append((bucket, self._file.tell(), len(records), sum(map(len, tokens))))
            self._file.write(np.array(records, RECORD).tobytes())
            self._file.write(np.concatenate(tokens).tobytes())
        self._clear()

    def _clear(self) -> None:
        self._block: dict[int, tuple[list[tuple[bytes, int, int, int, int]], list[np.ndarray]]] = {}
        self._block_bytes = 0


def read_bucket(
    file: pathlib.Path, bucket: int, buckets: int, dtype: np.dtype, *, tokens: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A bucket's documents slice by slice, in the unit's order; `buckets` and `dtype` are those
    that the file was written with.

    Yields:
      RECORD[D], one per document, with `subset` an index into the unit's names; and int[T], their
      concatenated tokens, empty unless `tokens`.
    """
    with open(file, "rb") as part:
        part.seek(-8 * (buckets + 1), os.SEEK_END)
        starts_at = part.tell()
        starts = np.frombuffer(part.read(), "<u8").astype(np.int64)
        part.seek(starts_at + int(starts[bucket] - starts[-1]) * _RUN.itemsize)
        count = int(starts[bucket + 1] - starts[bucket])
        for run in np.frombuffer(part.read(count * _RUN.itemsize), _RUN):
            part.seek(int(run["offset"]))
            records_D = np.frombuffer(part.read(int(run["documents"]) * RECORD.itemsize), RECORD)
            token_bytes = int(run["tokens"]) * dtype.itemsize if tokens else 0
            yield records_D, np.frombuffer(part.read(token_bytes), dtype)
