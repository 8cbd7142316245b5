"""Log-likelihoods of continuations, and whether greedy decoding would give the same tokens.

Sequences are padded to a few lengths, so that few programs are compiled, and each batch is split
over the mesh. Logits are computed in chunks (`distill/chunked_loss.py`).
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
        by_length: dict[int, list[int]] = {}
        for index, (ids, _) in enumerate(sequences):
            length = padded_length(len(ids) - 1, _SHORTEST, self._examinee.saved.config.max_length)
            by_length.setdefault(length, []).append(index)
        chunks = [
            (length, by_length[length][first : first + self._batch_size])
            for length in sorted(by_length, reverse=True)
            for first in range(0, len(by_length[length]), self._batch_size)
        ]
        batches = (
            self._batch([sequences[index] for index in chunk], length) for length, chunk in chunks
        )
        results = in_order.over_batches(
            self._program,
            self._examinee.params,
            batches,
            self._examinee.mesh,
            self._examinee.rules,
        )
        for (_, chunk), (batch, (loss_BxL, greater_BxL)) in zip(chunks, results, strict=True):
            counted_BxL = batch["loss_weights"] > 0
            nats_B = np.where(counted_BxL, loss_BxL, 0).sum(axis=1, dtype=np.float64)
            greedy_B = ((greater_BxL == 0) | ~counted_BxL).all(axis=1)
            if not np.isfinite(nats_B).all():
                broken = chunk[int(np.argmin(np.isfinite(nats_B)))]
                raise NotFiniteError(
                    f"The model's log-likelihood of request {broken} is not finite: use another "
                    "checkpoint."
                )
            yield {
                index: (-float(nats_B[row]), bool(greedy_B[row])) for row, index in enumerate(chunk)
            }

    def _batch(self, sequences: Sequence[tuple[Sequence[int], int]], length: int) -> Batch:
        shape = (self._batch_size, length)
        batch: Batch = {
            name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "segment_ids")
        }
        batch["loss_weights"] = np.zeros(shape, np.float32)
        batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
        batch["subset"] = np.zeros(self._batch_size, np.int32)
        for row, (ids, scored) in enumerate(sequences):
            end = len(ids) - 1
            assert 0 < scored <= end, f"{scored} of {len(ids)} ids to be scored"
            batch["inputs"][row, :end] = ids[:-1]
            batch["targets"][row, :end] = ids[1:]
            batch["segment_ids"][row, :end] = 1
            batch["loss_weights"][row, end - scored : end] = 1.0
        return batch
