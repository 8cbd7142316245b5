"""Log-likelihoods of continuations: token ids in; nats, and whether greedy decoding says the same.

Sequences are padded to a few lengths, so that few programs are compiled, and batches of a length
are laid over the mesh. Logits are made in chunks (`distill/chunked_loss.py`), never all at once.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salt_jax.data.features import Batch
from salt_jax.distill import chunked_loss, losses
from salt_jax.models import decoder
from salt_jax.training import in_order, partitioning
from salt_jax.training.finite import NotFiniteError

_SHORTEST = 64  # tokens; the other lengths are its doubles


@dataclasses.dataclass(frozen=True)
class Scored:
    """A continuation, after the tokens before it.

    Attributes:
      index: Which of the sequences given.
      log_likelihood: The sum of log p of its tokens, nats.
      greedy: Whether each of them is a most likely one.
    """

    index: int
    log_likelihood: float
    greedy: bool


class Scorer:
    """Scores sequences with one model.

    Args:
      config: The model.
      params: Its parameters, on the mesh.
      mesh: Where to compute.
      rules: From logical to mesh axes.
      batch_size: Sequences at once, rounded up to what the mesh needs.
      chunk_tokens: Tokens whose logits a device holds at once.
    """

    def __init__(
        self,
        config: decoder.DecoderConfig,
        params: Any,
        mesh: Mesh,
        rules: partitioning.Rules = partitioning.DEFAULT_RULES,
        batch_size: int = 16,
        chunk_tokens: int = losses.LossConfig.chunk_tokens,
    ) -> None:
        self._max_length, self._params = config.max_length, params
        self._mesh, self._rules = mesh, rules
        self._batch_size = in_order.rounded_up(batch_size, mesh)
        self._program = jax.jit(_ranks_program(config, mesh, rules, chunk_tokens))

    def __call__(
        self, sequences: Sequence[tuple[Sequence[int], int]]
    ) -> Iterator[tuple[Scored, ...]]:
        """Scores the last tokens of sequences, the longest first, so that memory fails at once.

        Args:
          sequences: Of each the ids, at least one more than are scored and at most one more than
            the model's max_length, and how many of the last ones to score.

        Yields:
          A batch's scores.

        Raises:
          InputError: The model gives a number that is not finite.
        """
        by_length: dict[int, list[int]] = {}
        for index, (ids, _) in enumerate(sequences):
            by_length.setdefault(self._padded_length(len(ids) - 1), []).append(index)
        chunks = [
            (length, by_length[length][first : first + self._batch_size])
            for length in sorted(by_length, reverse=True)
            for first in range(0, len(by_length[length]), self._batch_size)
        ]
        batches = (
            self._batch([sequences[index] for index in chunk], length) for length, chunk in chunks
        )
        results = in_order.over_batches(
            self._program, self._params, batches, self._mesh, self._rules
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
            yield tuple(
                Scored(index, -float(nats_B[row]), bool(greedy_B[row]))
                for row, index in enumerate(chunk)
            )

    def _padded_length(self, length: int) -> int:
        padded = _SHORTEST
        while padded < length:
            padded *= 2
        return min(padded, self._max_length)

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


def _ranks_program(
    config: decoder.DecoderConfig, mesh: Mesh, rules: partitioning.Rules, chunk_tokens: int
) -> Any:
    """(params, batch) → (−log p of the target, number of likelier ids), [B, L] each."""
    sharding = partitioning.head_sharding(mesh, rules)

    def program(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        return chunked_loss.target_ranks(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            config.vocab_size or 0,
            chunk_tokens=chunk_tokens,
            sharding=sharding,
        )

    return program
