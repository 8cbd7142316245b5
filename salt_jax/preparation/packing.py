"""Documents into rows of one length, in NumPy.

In: a split's documents as token ids, each with its subset. Out: rows, in an order shuffled once by
the seed.

`concatenate_and_split` writes the documents one after another, in shuffled order, and cuts the
stream every L tokens, as the paper does: no padding but in the last row; a row is one segment, so
attention crosses documents. A row's first token has no context and no loss weight. L = 4, documents
[5 6 7 1] and [8 9 1]:

    targets       5 6 7 1 | 8 9 1 0
    loss_weights  0 1 1 1 | 0 1 1 0
    segment_ids   1 1 1 1 | 1 1 1 0

`whole_documents` puts whole documents into rows, best fit first (the longest document goes where it
leaves least room; as in arXiv 2404.10830), each a segment of its own. Only a document longer than L
is cut, and the first token of its later pieces has no loss weight. Documents [5 6 1] and [8 1], L =
6:

    targets       5 6 1 8 1 0
    loss_weights  1 1 1 1 1 0
    segment_ids   1 1 1 2 2 0

A document may begin with a prompt, which has no loss weight. The same, 5 and 8 being prompts:

    loss_weights  0 1 1 0 1 0
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from salt_jax.data.features import Row, make_row
from salt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """How documents become rows.

    Attributes:
      sequence_length: L, tokens a row.
      packing: "concatenate_and_split" or "whole_documents".
      shards: Files a split is cut into.
      seed: Of the order of documents and rows.
      long_documents: What becomes of a document longer than a row: "split" into pieces, each a
        segment; "drop" leaves it out; "cut" takes tokens away, first from its prompt's beginning,
        then from its end. The last two count such documents, and are for whole_documents.
    """

    sequence_length: int = 128
    packing: str = "concatenate_and_split"
    shards: int = 1
    seed: int = 0
    long_documents: str = "split"

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise InputError(f"packing is {self.packing!r}, expected one of {', '.join(PACKINGS)}.")
        for name, least in (("sequence_length", 2), ("shards", 1), ("seed", None)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or (least is not None and value < least):
                least_words = "" if least is None else f" of {least} or more"
                raise InputError(f"{name} is {value!r}, expected a whole number{least_words}.")
            if least is not None and value >= 2**31:
                raise InputError(f"{name} is {value} and must be below 2³¹: change --{name}.")
        if self.long_documents not in LONG_DOCUMENTS:
            raise InputError(
                f"long_documents is {self.long_documents!r}, expected one of "
                f"{', '.join(LONG_DOCUMENTS)}."
            )
        if self.long_documents != "split" and self.packing != "whole_documents":
            raise InputError(
                f"long_documents is {self.long_documents!r} and packing {self.packing!r}, which "
                "cuts documents wherever a row ends: set packing to 'whole_documents'."
            )

    def require_for_prompts(self) -> None:
        """Refuses to pack documents with prompts so that a response loses its own.

        Raises:
          InputError: Documents are split.
        """
        if self.long_documents == "split":
            raise InputError(
                f"packing is {self.packing!r} and long_documents 'split', which can part a "
                "response from its prompt: set packing to 'whole_documents' and long_documents to "
                "'drop' or 'cut'."
            )


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Stretches of a token stream and the rows they go to, ascending by row.

    Attributes:
      rows: int64[P], the row of each piece.
      starts: int64[P], its first token's place in the stream.
      lengths: int64[P], its tokens.
      begin_documents: bool[P], whether its first token begins a document, and is trained on.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    begin_documents: np.ndarray


class PackedSplit:
    """A split's rows, in their final order."""

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        subset_D: np.ndarray,
        *,
        packing: str,
        sequence_length: int,
        pad_id: int,
        seed: int,
        split: str,
        prompt_tokens_D: np.ndarray | None = None,
    ):
        """Packs and shuffles.

        Args:
          documents: Token ids of each document, its end included.
          subset_D: Index of each document's subset.
          packing: "concatenate_and_split" or "whole_documents".
          sequence_length: L, tokens a row.
          pad_id: What fills rows up.
          seed: Of the order of documents and of rows.
          split: Enters the order too, so that splits differ.
          prompt_tokens_D: Tokens at the beginning of each document that have no loss weight; none
            where it is None.
        """
        order_D = shuffled_order(len(documents), seed, f"documents of {split}")
        lengths_D = np.array([len(documents[index]) for index in order_D], np.int64)
        offsets_E = np.concatenate([[0], np.cumsum(lengths_D)])
        self._stream_T = np.concatenate([documents[index] for index in order_D])
        self._trained_T = np.ones(len(self._stream_T), bool)
        if prompt_tokens_D is not None:
            place_T = np.arange(len(self._stream_T)) - np.repeat(offsets_E[:-1], lengths_D)
            self._trained_T = place_T >= np.repeat(np.asarray(prompt_tokens_D)[order_D], lengths_D)
        self._pieces = PACKINGS[packing](offsets_E, sequence_length)
        self._subset_N = _subset_of_rows(self._pieces, offsets_E, np.asarray(subset_D)[order_D])
        self._first_piece_N = np.searchsorted(self._pieces.rows, np.arange(len(self) + 1))
        self._order_N = shuffled_order(len(self), seed, f"rows of {split}")
        self._sequence_length = sequence_length
        self._pad_id = pad_id

    def __len__(self) -> int:
        return int(self._pieces.rows[-1]) + 1

    def __iter__(self) -> Iterator[Row]:
        for row_id, packed in enumerate(self._order_N):
            yield self._row(int(packed), row_id)

    def _row(self, packed: int, row_id: int) -> Row:
        length, pieces, at = self._sequence_length, self._pieces, 0
        targets_L = np.full(length, self._pad_id, np.int32)
        weights_L = np.zeros(length, np.float32)
        segment_ids_L = np.zeros(length, np.int32)
        first, end = self._first_piece_N[packed : packed + 2]
        for segment, piece in enumerate(range(first, end), start=1):
            start, size = pieces.starts[piece], pieces.lengths[piece]
            targets_L[at : at + size] = self._stream_T[start : start + size]
            weights_L[at : at + size] = self._trained_T[start : start + size]
            weights_L[at] *= pieces.begin_documents[piece]
            segment_ids_L[at : at + size] = segment
            at += size
        return make_row(targets_L, weights_L, segment_ids_L, self._subset_N[packed], row_id)


def concatenate_and_split(offsets_E: np.ndarray, sequence_length: int) -> Pieces:
    """One piece a row: the stream cut every `sequence_length` tokens.

    Args:
      offsets_E: Where each document begins in the stream, and the stream's end (E = D + 1).
      sequence_length: L, tokens a row.
    """
    tokens = int(offsets_E[-1])
    start_P = np.arange(0, tokens, sequence_length)
    length_P = np.minimum(sequence_length, tokens - start_P)
    return Pieces(np.arange(len(start_P)), start_P, length_P, np.zeros(len(start_P), bool))


def whole_documents(offsets_E: np.ndarray, sequence_length: int) -> Pieces:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row that still takes it.

    Args: see `concatenate_and_split`.
    """
    lengths_D = np.diff(offsets_E)
    pieces_D = -(-lengths_D // sequence_length)
    document_P = np.repeat(np.arange(len(lengths_D)), pieces_D)
    index_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    start_P = offsets_E[document_P] + index_P * sequence_length
    length_P = np.minimum(sequence_length, offsets_E[document_P + 1] - start_P)
    row_P = np.empty(len(start_P), np.int64)
    rooms: list[int] = []  # the room left in open rows, ascending, each size once
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
    """A document cut to a row: its prompt's beginning goes first, then its end.

    Args:
      tokens_T: Its tokens.
      prompt_tokens: How many of them are its prompt.
      sequence_length: L, how many may stay.

    Returns:
      The tokens that stay, and how many of them are the prompt.
    """
    from_prompt = min(max(len(tokens_T) - sequence_length, 0), prompt_tokens)
    return tokens_T[from_prompt:][:sequence_length], prompt_tokens - from_prompt


LONG_DOCUMENTS = ("split", "drop", "cut")

PACKINGS: Mapping[str, Callable[[np.ndarray, int], Pieces]] = {
    "concatenate_and_split": concatenate_and_split,
    "whole_documents": whole_documents,
}


def shuffled_order(size: int, seed: int, purpose: str) -> np.ndarray:
    """A permutation int64[size] that depends on its arguments alone, not on a library's version.

    Element i's key is a 64-bit mix (splitmix64's finalizer) of i and a hash of seed and purpose;
    the permutation sorts by key. A part of the elements can thus be keyed without the others.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    mixed_N = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N += np.uint64(int.from_bytes(digest, "little"))
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed_N ^ (mixed_N >> np.uint64(31)), kind="stable")


def _subset_of_rows(pieces: Pieces, offsets_E: np.ndarray, subset_D: np.ndarray) -> np.ndarray:
    """The subset with the most tokens in each row; of equals, the first by index.

    The stream is cut where a piece or a document begins; each stretch has one row and one subset,
    and the tokens of equal pairs are added up. Memory grows with stretches, not with subsets.
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
