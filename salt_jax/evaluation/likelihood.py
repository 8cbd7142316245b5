"""Log-likelihoods of continuations, and whether greedy decoding would give the same tokens.

Sequences are padded to a few lengths, so that few programs are compiled, and each batch is split
over the mesh. Sequences that differ in their last token share a row, as most choices of one token
do. Logits are computed of scored tokens alone, in chunks (`distill/chunked_loss.py`).
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from salt_jax.data.features import Batch
from salt_jax.evaluation.examination import Examinee
from salt_jax.inference.generation import padded_length
from salt_jax.training import in_order
from salt_jax.training.finite import NotFiniteError

_SHORTEST = 64  # the shortest padded length, tokens
_FEWEST_PLACES = 8  # the same of the scored tokens of a row
_OF_INPUTS, _OF_TARGETS = ("inputs", "segment_ids"), ("targets", in_order.SCORED_PLACES)


class Scorer:
    """Scores continuations with one model."""

    def __init__(self, examinee: Examinee) -> None:
        self._examinee = examinee
        self._batch_size = in_order.rounded_up(examinee.batch_size, examinee.mesh)
        self._program = jax.jit(
            functools.partial(
                in_order.ranks_of_batch,
                examinee.saved.config,
                mesh=examinee.mesh,
                rules=examinee.rules,
                chunk_tokens=examinee.chunk_tokens,
            )
        )

    def __call__(
        self, sequences: Sequence[tuple[Sequence[int], int]]
    ) -> Iterator[dict[int, tuple[float, bool]]]:
        """Scores the last tokens of sequences; the longest first, to run out of memory early.

        Args:
          sequences: The ids of each (at least one more than are scored, at most one more than the
            model's max_length), and the number of last ids to score.

        Yields:
          A batch's results by index: the log-likelihood of the scored tokens, in nats, and whether
          each of them is a most likely one. InputError if a log-likelihood is not finite.
        """
        same_inputs: dict[tuple[int, ...], list[int]] = {}
        for index, (ids, _) in enumerate(sequences):
            same_inputs.setdefault(tuple(ids[:-1]), []).append(index)
        by_length: dict[int, list[list[int]]] = {}
        for inputs, indices in same_inputs.items():
            length = padded_length(len(inputs), _SHORTEST, self._examinee.saved.config.max_length)
            by_length.setdefault(length, []).append(indices)
        chunks = [
            (length, _most_scored(sequences, rows), rows[first : first + self._batch_size])
            for length, rows in sorted(by_length.items(), reverse=True)
            for first in range(0, len(rows), self._batch_size)
        ]
        batches = (
            self._batch([[sequences[index] for index in row] for row in chunk], length, places)
            for length, places, chunk in chunks
        )
        results = in_order.over_batches(
            self._program,
            self._examinee.params,
            batches,
            self._examinee.mesh,
            self._examinee.rules,
        )
        for (_, _, chunk), (_, (loss_BxT, greater_BxT)) in zip(chunks, results, strict=True):
            answers: dict[int, tuple[float, bool]] = {}
            for row, indices in enumerate(chunk):
                end = 0
                for index in indices:
                    start, end = end, end + sequences[index][1]
                    nats = loss_BxT[row, start:end].sum(dtype=np.float64)
                    if not np.isfinite(nats):
                        raise NotFiniteError(
                            f"The model's log-likelihood of request {index} is not finite: use "
                            "another checkpoint."
                        )
                    answers[index] = -float(nats), not greater_BxT[row, start:end].any()
            yield answers

    def _batch(
        self, rows: Sequence[Sequence[tuple[Sequence[int], int]]], length: int, places: int
    ) -> Batch:
        """A row for the sequences of the same inputs, with the scored tokens of all of them."""
        size = self._batch_size
        batch: Batch = {name: np.zeros((size, length), np.int32) for name in _OF_INPUTS}
        batch |= {name: np.zeros((size, places), np.int32) for name in _OF_TARGETS}
        batch["loss_weights"] = np.zeros((size, places), np.float32)
        batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
        batch["subset"] = np.zeros(size, np.int32)
        for row, sequences in enumerate(rows):
            last = 0
            for ids, scored in sequences:
                end = len(ids) - 1
                assert 0 < scored <= end, f"{scored} of {len(ids)} ids to be scored"
                batch["inputs"][row, :end], batch["segment_ids"][row, :end] = ids[:-1], 1
                first, last = last, last + scored
                batch["targets"][row, first:last] = ids[-scored:]
                batch[in_order.SCORED_PLACES][row, first:last] = range(end - scored, end)
                batch["loss_weights"][row, first:last] = 1.0
        return batch


def _most_scored(
    sequences: Sequence[tuple[Sequence[int], int]], rows: Sequence[Sequence[int]]
) -> int:
    """The most scored tokens of a row, padded so that few programs are compiled."""
    most = max(sum(sequences[index][1] for index in row) for row in rows)
    return padded_length(most, _FEWEST_PLACES, 1 << 30)
