"""How well do a row's scores follow from its tokens alone, fitted on a tenth of the rows?

A ridge regression from features that need no model: the subset, the number of tokens, the share of
distinct tokens and pairs, bytes after zlib, and mean, deviation and quantiles of -log P by unigrams
and by bigrams (Witten-Bell) counted on the rows. For each column: Spearman's rank correlation
on the other nine tenths, and the share of their better half that the prediction's better half has
(half by chance), without the bigrams and with them.
"""

import argparse
import warnings
import zlib

import measurement
import numpy as np
import scipy.stats

from salt_jax.data.features import make_batch
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import SUBSET, RowScores

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def measure(cache: str, scores: str, columns: list[str]) -> dict[str, dict[str, list[float]]]:
    """Correlation and share, by column and features."""
    packed, scored = PackedCache.open(cache), RowScores.open(scores)
    rows = packed.split(scored.manifest["split"])
    blocks = [
        make_batch(rows.__getitems__(range(at, min(at + 4096, len(rows)))), packed.start_id)
        for at in range(0, len(rows), 4096)
    ]
    inputs, targets, weights = (
        np.concatenate([block[name] for block in blocks])
        for name in ("inputs", "targets", "loss_weights")
    )
    size, subsets = packed.vocabulary_size, scored.column(SUBSET)[:]
    unigram, bigram = losses(inputs, targets, weights > 0, size)
    of_all = [
        *(subsets == subset for subset in np.unique(subsets)),
        (weights > 0).sum(axis=1),
        *(distinct(values) for values in (targets, inputs.astype(np.int64) * size + targets)),
        [len(zlib.compress(row.astype("<u2").tobytes())) for row in targets],
        *moments(unigram),
    ]
    without, both = (standard(parts) for parts in (of_all, [*of_all, *moments(bigram)]))
    results, order = {}, np.random.default_rng(0).permutation(len(targets))
    for name in columns or scored.columns:
        score = scored.column(name)[:].astype(np.float64)
        fitted, others = (
            part[np.isfinite(score[part])] for part in np.split(order, [len(order) // 10])
        )
        results[name] = {
            "unigrams": quality(without, score, fitted, others),
            "and_bigrams": quality(both, score, fitted, others),
        }
    return results


def losses(
    inputs: np.ndarray, targets: np.ndarray, counts: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """-log P of each token by unigrams and by bigrams, NaN where it doesn't count."""
    unigram = np.bincount(targets[counts], minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(
        inputs[counts].astype(np.int64) * size + targets[counts], minlength=size * size
    ).reshape(size, size)
    after, followers = pairs.sum(axis=1), np.maximum((pairs > 0).sum(axis=1), 1)
    smoothed = pairs[inputs, targets] + followers[inputs] * unigram[targets]
    bigram = smoothed / (after + followers)[inputs]
    return tuple(np.where(counts, -np.log(p), np.nan) for p in (unigram[targets], bigram))


def moments(values: np.ndarray) -> list[np.ndarray]:
    return [
        np.nanmean(values, axis=1),
        np.nanstd(values, axis=1),
        *np.nanquantile(values, QUANTILES, axis=1),
    ]


def distinct(values: np.ndarray) -> np.ndarray:
    return (np.diff(np.sort(values, axis=1), axis=1) != 0).mean(axis=1)


def standard(features: list) -> np.ndarray:
    x = np.stack([np.asarray(feature, np.float64) for feature in features], axis=1)
    x = (np.nan_to_num(x) - np.nanmean(x, axis=0)) / (np.nanstd(x, axis=0) + 1e-9)
    return np.pad(x, ((0, 0), (1, 0)), constant_values=1.0)


def quality(
    x: np.ndarray, score: np.ndarray, fitted: np.ndarray, others: np.ndarray
) -> list[float]:
    ridge = 1e-3 * len(fitted) * np.eye(x.shape[1])
    weights = np.linalg.solve(x[fitted].T @ x[fitted] + ridge, x[fitted].T @ score[fitted])
    predicted, true = x[others] @ weights, score[others]
    better = (values >= np.median(values) for values in (predicted, true))
    shared = np.logical_and(*better).sum() / (len(true) / 2)
    return [scipy.stats.spearmanr(predicted, true).statistic, shared]


def main() -> None:
    """Measures and prints."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("cache", help="a folder of `salt prepare`")
    parser.add_argument("scores", help="one of `salt score` on it")
    parser.add_argument("columns", nargs="*", help="all by default")
    flags = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # rows without a token that counts
    results = measure(flags.cache, flags.scores, flags.columns)
    measurement.report("predicted_scores", {"settings": vars(flags), **results})


if __name__ == "__main__":
    main()
