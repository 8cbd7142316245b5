"""Packs documents into rows of one length, in NumPy.

`concatenate_and_split` concatenates the documents in shuffled order and cuts the stream every L
tokens, as in the paper: only the last row is padded; a row is one segment, so attention crosses
documents. A row's first token has no context and is masked out of the loss. L = 4, documents
[5 6 7 1] and [8 9 1]:

    targets       5 6 7 1 | 8 9 1 0
    loss_weights  0 1 1 1 | 0 1 1 0
    segment_ids   1 1 1 1 | 1 1 1 0

`whole_documents` packs whole documents by best-fit decreasing (arXiv 2404.10830), each as its own
segment. Only a document longer than L is split, and the first token of its later pieces is masked
out. Documents [5 6 1] and [8 1], L = 6:

    targets       5 6 1 8 1 0
    loss_weights  1 1 1 1 1 0
    segment_ids   1 1 1 2 2 0

A document may begin with a prompt, which is masked out. The same with prompts [5] and [8]:

    loss_weights  0 1 1 0 1 0
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from salt_jax.data.features import Row, make_row
from salt_jax.errors import InputError, require_counts


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents become the rows of a cache.

    Attributes:
      sequence_length: L, tokens per row.
      packing: "concatenate_and_split" or "whole_documents".
      long_documents: With whole_documents, how to treat a document longer than a row: "split" cuts
        it into pieces, each a segment; "drop" leaves it out; "cut" truncates it to a row, first
        its prompt from the front, then its end. Dropped and cut documents are counted. Prompts and
        responses need "drop" or "cut".
      shards: Files of the train split; other splits get a share by their text, at least 1. A
        worker holds one shard in memory while packing it.
      seed: Seed of the order of documents and of rows.
      drop_duplicates: Keep only the first of a split's documents with equal texts. Duplicates are
        counted in either case.
    """

    sequence_length: int = 128
    packing: str = "concatenate_and_split"
    long_documents: str = "split"
    shards: int = 1
    seed: int = 0
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("packing", PACKINGS), ("long_documents", LONG_DOCUMENTS)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}: "
                    f"change --{name}."
                )
        require_counts(2, sequence_length=self.sequence_length)
        require_counts(shards=self.shards)
        if self.long_documents != "split" and self.packing != "whole_documents":
            raise InputError(
                f"long_documents is {self.long_documents!r} and packing {self.packing!r}, which "
                "cuts documents wherever a row ends: set packing to 'whole_documents'."
            )

    def require_for_prompts(self) -> None:
        """Raises InputError if documents are split, which would separate responses from prompts."""
        if self.long_documents == "split":
            raise InputError(
                f"packing is {self.packing!r} and long_documents 'split', which can separate a "
                "response from its prompt: set packing to 'whole_documents' and long_documents to "
                "'drop' or 'cut'."
            )


def pack(
    documents: Sequence[np.ndarray],
    subset_D: np.ndarray,
    prompt_tokens_D: np.ndarray,
    packing: Packing,
    *,
    pad_id: int,
    split: str,
) -> Iterator[Row]:
    """Packs documents into rows, shuffled by the seed.

    Args:
      documents: Token ids of each document, its end included; too long ones already dropped or cut.
      subset_D: Index of each document's subset.
      prompt_tokens_D: Tokens at the start of each document that are masked out of the loss.
      packing: How to pack.
      pad_id: Fills rows.
      split: Part of the random key, so that splits are ordered differently.
    """
    length = packing.sequence_length
    order_D = shuffled_order(len(documents), packing.seed, f"documents of {split}")
    lengths_D = np.array([len(documents[index]) for index in order_D], np.int64)
    offsets_E = np.concatenate([[0], np.cumsum(lengths_D)])
    stream_T = np.concatenate([documents[index] for index in order_D])
    begins_T = np.repeat(offsets_E[:-1] + prompt_tokens_D[order_D], lengths_D)
    trained_T = np.arange(len(stream_T)) >= begins_T
    del begins_T  # four times as large as the tokens
    pieces = PACKINGS[packing.packing](offsets_E, length)
    subset_N = _subset_of_rows(pieces, offsets_E, subset_D[order_D])
    rows = len(subset_N)
    first_piece_N = np.searchsorted(pieces.rows, np.arange(rows + 1))
    for row_id, row in enumerate(shuffled_order(rows, packing.seed, f"rows of {split}")):
        targets_L = np.full(length, pad_id, np.int32)
        weights_L = np.zeros(length, np.float32)
        segment_ids_L = np.zeros(length, np.int32)
        at = 0
        for segment, piece in enumerate(range(*first_piece_N[row : row + 2]), start=1):
            start, size = pieces.starts[piece], pieces.lengths[piece]
            targets_L[at : at + size] = stream_T[start : start + size]
            weights_L[at : at + size] = trained_T[start : start + size]
            weights_L[at] *= pieces.begin_documents[piece]
            segment_ids_L[at : at + size] = segment
            at += size
        yield make_row(targets_L, weights_L, segment_ids_L, subset_N[row], row_id)


class Pieces(NamedTuple):
    """Slices of a token stream and the rows they go to, ascending by row.

    Attributes:
      rows: int64[P], the row of each piece.
      starts: int64[P], the offset of its first token in the stream.
      lengths: int64[P], its tokens.
      begin_documents: bool[P], whether its first token begins a document and is trained on.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    begin_documents: np.ndarray


def concatenate_and_split(offsets_E: np.ndarray, sequence_length: int) -> Pieces:
    """One piece per row: the stream cut every `sequence_length` tokens. `offsets_E` are the
    documents' offsets in the stream, and its end (E = D + 1)."""
    tokens = int(offsets_E[-1])
    start_P = np.arange(0, tokens, sequence_length)
    length_P = np.minimum(sequence_length, tokens - start_P)
    return Pieces(np.arange(len(start_P)), start_P, length_P, np.zeros(len(start_P), bool))


def whole_documents(offsets_E: np.ndarray, sequence_length: int) -> Pieces:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row with room for it.
    Arguments as for `concatenate_and_split`."""
    lengths_D = np.diff(offsets_E)
    pieces_D = -(-lengths_D // sequence_length)
    document_P = np.repeat(np.arange(len(lengths_D)), pieces_D)
    index_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    start_P = offsets_E[document_P] + index_P * sequence_length
    length_P = np.minimum(sequence_length, offsets_E[document_P + 1] - start_P)
    row_P = np.empty(len(start_P), np.int64)
    rooms: list[int] = []  # the distinct sizes of free room in open rows, ascending
    rows_with_room: dict[int, list[int]] = {}
    rows = 0
    for piece in np.argsort(-length_P, kind="stable"):
        size = int(length_P[piece])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            row, room = rows, sequence_length
            rows += 1
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        row_P[piece] = row
        if left := room - size:
            if left not in rows_with_room:
                bisect.insort(rooms, left)
            rows_with_room.setdefault(left, []).append(row)
    by_row = np.argsort(row_P, kind="stable")
    return Pieces(row_P[by_row], start_P[by_row], length_P[by_row], (index_P == 0)[by_row])


def cut_document(
    tokens_T: np.ndarray, prompt_tokens: int, sequence_length: int
) -> tuple[np.ndarray, int]:
    """A document truncated to a row, first its prompt from the front, then its end; returns its
    tokens and how many of them are the prompt."""
    from_prompt = min(max(len(tokens_T) - sequence_length, 0), prompt_tokens)
    return tokens_T[from_prompt:][:sequence_length], prompt_tokens - from_prompt


LONG_DOCUMENTS = ("split", "drop", "cut")

PACKINGS: Mapping[str, Callable[[np.ndarray, int], Pieces]] = {
    "concatenate_and_split": concatenate_and_split,
    "whole_documents": whole_documents,
}


def shuffled_order(size: int, seed: int, purpose: str) -> np.ndarray:
    """A permutation int64[size] that depends only on its arguments, not on a library's version.

    It sorts elements by a 64-bit mix (splitmix64's finalizer) of their index and a hash of seed and
    purpose.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    mixed_N = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N += np.uint64(int.from_bytes(digest, "little"))
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed_N ^ (mixed_N >> np.uint64(31)), kind="stable")


def _subset_of_rows(pieces: Pieces, offsets_E: np.ndarray, subset_D: np.ndarray) -> np.ndarray:
    """int64[N]: the subset with the most tokens in each row, the lowest index if tied.

    The stream is cut where a piece or a document begins, so that a stretch has one row and one
    subset, and tokens are summed by that pair: a dense table could take gigabytes.
    """
    by_start = np.argsort(pieces.starts, kind="stable")
    start_S = np.union1d(pieces.starts, offsets_E[:-1])
    length_S = np.diff(np.append(start_S, offsets_E[-1]))
    piece_S = by_start[np.searchsorted(pieces.starts[by_start], start_S, side="right") - 1]
    document_S = np.searchsorted(offsets_E[:-1], start_S, side="right") - 1
    pair_S = np.stack([pieces.rows[piece_S], subset_D[document_S]], axis=1)
    pair_Q, index_S = np.unique(pair_S, axis=0, return_inverse=True)
    tokens_Q = np.bincount(index_S.ravel(), weights=length_S)
    best_first_Q = np.lexsort([pair_Q[:, 1], -tokens_Q, pair_Q[:, 0]])
    rows_Q, subsets_Q = pair_Q[best_first_Q].T
    return subsets_Q[np.unique(rows_Q, return_index=True)[1]]
