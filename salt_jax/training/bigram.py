"""A bigram model, the baseline that a language model must beat before its numbers mean anything.

It has Witten-Bell smoothing (Witten & Bell 1991), over a unigram model smoothed the same way:

    P(b | a) = (c(a, b) + T(a) · P(b)) / (c(a) + T(a))        P(b) = (c(b) + T / V) / (c + T)

c are counts in the training split, T(a) is the number of distinct followers of a, T that of
distinct tokens, V the vocabulary's size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from salt_jax.data import features


def bigram_log_perplexity(
    train_rows: Any, held_out_rows: Any, vocab_size: int, start_id: int
) -> float:
    """Mean −log P(target | input) over held-out tokens with loss weight, in nats per token.

    Both splits are `PackedSplit`s; `start_id` is the input of a segment's first token.
    """
    codes, counts = np.unique(np.zeros(0, np.int64), return_counts=True)
    for previous_n, target_n in _pairs(train_rows, start_id):
        part, part_counts = np.unique(previous_n * vocab_size + target_n, return_counts=True)
        codes, inverse = np.unique(np.concatenate([codes, part]), return_inverse=True)
        both = np.concatenate([counts, part_counts])
        counts = np.bincount(inverse, weights=both, minlength=len(codes)).astype(np.int64)
    after_V = np.bincount(codes // vocab_size, weights=counts, minlength=vocab_size)
    followers_V = np.bincount(codes // vocab_size, minlength=vocab_size)
    unigram_V = np.bincount(codes % vocab_size, weights=counts, minlength=vocab_size)
    distinct = np.count_nonzero(unigram_V)
    p_V = (unigram_V + distinct / vocab_size) / (unigram_V.sum() + distinct)
    loss = tokens = 0.0
    for previous_n, target_n in _pairs(held_out_rows, start_id):
        wanted = previous_n * vocab_size + target_n
        index = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        count_n = np.where(codes[index] == wanted, counts[index], 0)
        unseen_n = after_V[previous_n] == 0
        types_n = np.where(unseen_n, 1, followers_V[previous_n])
        p_n = (count_n + types_n * p_V[target_n]) / (after_V[previous_n] + types_n)
        loss -= float(np.log(p_n).sum())
        tokens += len(target_n)
    return loss / max(tokens, 1.0)


def _pairs(rows: Any, start_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input, target) ids of all tokens with loss weight, int64, some thousand rows at a time."""
    for first in range(0, len(rows), 4096):
        ids = range(first, min(first + 4096, len(rows)))
        batch = features.make_batch(rows.__getitems__(list(ids)), start_id)
        counts_BxL = batch["loss_weights"] > 0
        yield (
            batch["inputs"][counts_BxL].astype(np.int64),
            batch["targets"][counts_BxL].astype(np.int64),
        )
