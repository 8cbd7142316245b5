"""Paired comparison of two models on the same tokens, with bootstrap intervals over documents.

Of every token t with loss weight, d_t = loss of the model − loss of the other, in nats. A group of
tokens (all, a subset, a decile of a third model's loss, an eighth of the row) has the mean of its
d_t. Tokens of one document are not independent, so intervals come from resampling documents with
replacement, as their pieces in rows: B. Efron and R. Tibshirani, An Introduction to the Bootstrap,
1993, the percentile interval.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.data import input_pipeline
from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import InputError
from salt_jax.evaluation.examination import Examinee
from salt_jax.terminal import Table
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel
from salt_jax.training.finite import NotFiniteError
from salt_jax.training.in_order import over_batches, ranks_of_batch, rounded_up

DECILES, POSITIONS = 10, 8
# Kinds of groups, and their headings.
KINDS = {
    "all": "all tokens",
    "by_subset": "subset",
    "by_position": "part of the row",
    "by_decile": "decile of the SLM's loss",
}
_RESAMPLES, _SEED, _AT_ONCE = 1000, 0, 50


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens with loss weight of a split, N of them.

    Attributes:
      losses: float32 [M, N], −log p of each token by each of M models, nats.
      pieces: [N], the piece of a document that holds the token, from 0: a segment of a row.
      subsets: [N], its row's subset.
      positions: [N], its place in the row, from 0.
    """

    losses: np.ndarray
    pieces: np.ndarray
    subsets: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of d_t over a group of tokens, nats per token, with its 95% interval.

    Attributes:
      mean: Negative where the model is the better.
      low: Lower end of the interval.
      high: Upper end.
      tokens: Tokens of the group.
      pieces: Pieces of documents that have some.
    """

    mean: float
    low: float
    high: float
    tokens: int
    pieces: int


def losses_by_token(
    models: Sequence[SavedModel], examinee: Examinee, cache: PackedCache, split: str, rows: int
) -> Tokens:
    """Losses of several models on the first rows of a split, in one pass over them.

    Raises:
      NotFiniteError: A model's losses are not finite.
    """
    mesh, rules = examinee.mesh, examinee.rules
    params = [
        examinee.params if model is examinee.saved else model.load_params(mesh, rules)
        for model in models
    ]

    def program(params: Sequence[Any], batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        losses = [
            ranks_of_batch(model.config, of_model, batch, mesh, rules, examinee.chunk_tokens)[0]
            for model, of_model in zip(models, params, strict=True)
        ]
        return (
            jnp.stack(losses),
            *(batch[name] for name in ("loss_weights", "segment_ids", "subset")),
        )

    def tokens() -> Iterator[tuple[np.ndarray, ...]]:
        batches = input_pipeline.in_order(
            cache.split(split),
            rounded_up(examinee.batch_size, mesh),
            cache.start_id,
            rows,
            *partitioning.batch_part(mesh),
        )
        jitted = jax.jit(program, out_shardings=partitioning.replicated(mesh))
        first_row = 0
        for _, (losses_MxBxL, weights_BxL, segments_BxL, subset_B) in over_batches(
            jitted, params, batches, mesh, rules
        ):
            row_N, position_N = np.nonzero(weights_BxL > 0)
            losses_MxN = losses_MxBxL[:, row_N, position_N]
            for model, losses_N in zip(models, losses_MxN, strict=True):
                if not np.isfinite(losses_N).all():
                    raise NotFiniteError(
                        f"The losses of {model.path} are not finite on rows of {split} of "
                        f"{cache.path}: use another checkpoint."
                    )
            length = weights_BxL.shape[1]
            piece_N = (first_row + row_N) * (length + 1) + segments_BxL[row_N, position_N]
            yield losses_MxN, piece_N, subset_B[row_N], position_N.astype(np.int32)
            first_row += len(weights_BxL)

    parts = zip(*tokens(), strict=True)
    losses_MxN, piece_N, subset_N, position_N = (np.concatenate(part, axis=-1) for part in parts)
    if not piece_N.size:
        raise InputError(f"{split} of {cache.path} has no token with loss weight in {rows} rows.")
    return Tokens(losses_MxN, np.unique(piece_N, return_inverse=True)[1], subset_N, position_N)


def token_groups(tokens: Tokens, cache: PackedCache) -> dict[str, dict[str, np.ndarray]]:
    """Masks of tokens, bool [N], by kind of group and group; a third model's losses, if there are
    any, divide the tokens into deciles, easy to hard (equal losses share one)."""
    position_N = tokens.positions * POSITIONS // cache.sequence_length
    made = {
        "all": {"all": np.ones(len(tokens.pieces), bool)},
        "by_subset": {name: tokens.subsets == i for i, name in enumerate(cache.subsets)},
        "by_position": {f"{i + 1} of {POSITIONS}": position_N == i for i in range(POSITIONS)},
    }
    if len(tokens.losses) > 2:
        loss_N = tokens.losses[2]
        edges = np.quantile(loss_N, np.arange(1, DECILES) / DECILES)
        decile_N = np.searchsorted(edges, loss_N)
        made["by_decile"] = {f"{i + 1} of {DECILES}": decile_N == i for i in range(DECILES)}
    return {
        kind: {name: mask_N for name, mask_N in of_kind.items() if mask_N.any()}
        for kind, of_kind in made.items()
    }


def differences(
    tokens: Tokens, by_kind: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Difference]]:
    """The difference of the first two models on each group. All groups share the resamples."""
    pieces = int(tokens.pieces.max()) + 1
    d_N = tokens.losses[0].astype(np.float64) - tokens.losses[1]
    masks = [mask_N for of_kind in by_kind.values() for mask_N in of_kind.values()]
    sums_PxG = np.stack(
        [np.bincount(tokens.pieces[mask_N], d_N[mask_N], pieces) for mask_N in masks], axis=1
    )
    counts_PxG = np.stack(
        [np.bincount(tokens.pieces[mask_N], minlength=pieces) for mask_N in masks], axis=1
    )
    generator, resampled = np.random.default_rng(_SEED), []
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn_RxP = np.stack(
            [
                np.bincount(generator.integers(pieces, size=pieces), minlength=pieces)
                for _ in range(_AT_ONCE)
            ]
        ).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a small group may have been drawn by no resample
            resampled.append((drawn_RxP @ sums_PxG) / (drawn_RxP @ counts_PxG))
    low_G, high_G = np.nanquantile(np.concatenate(resampled), (0.025, 0.975), axis=0)
    mean_G, tokens_G = sums_PxG.sum(axis=0) / counts_PxG.sum(axis=0), counts_PxG.sum(axis=0)
    pieces_G = (counts_PxG > 0).sum(axis=0)
    columns = (mean_G, low_G, high_G, tokens_G, pieces_G)
    of_group = map(Difference, *(each_G.tolist() for each_G in columns))
    return {kind: dict(zip(of_kind, of_group, strict=False)) for kind, of_kind in by_kind.items()}


def differences_to_json(found: Mapping[str, Mapping[str, Difference]]) -> dict[str, Any]:
    """As summary.json holds it."""
    return {
        kind: {name: dataclasses.asdict(each) for name, each in of_kind.items()}
        for kind, of_kind in found.items()
    }


def differences_from_json(comparison: Mapping[str, Any]) -> dict[str, dict[str, Difference]]:
    """The differences of a summary.json.

    Raises:
      ValueError: It is malformed.
    """
    try:
        found = {
            kind: {name: Difference(**each) for name, each in comparison.get(kind, {}).items()}
            for kind in KINDS
        }
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from error
    numbers = [x for of in found.values() for each in of.values() for x in vars(each).values()]
    if not found["all"] or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("a difference is missing or is not numbers")
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def difference_table(found: Mapping[str, Mapping[str, Difference]], title: str) -> Table:
    """The differences, a row for each group."""
    return Table(
        title,
        ("group", "difference (nats per token)", "95% interval", "tokens", "pieces of documents"),
        tuple(
            (
                name if kind == "all" else f"{KINDS[kind]}: {name}",
                f"{each.mean:+.4f}",
                f"{each.low:+.4f} to {each.high:+.4f}",
                f"{each.tokens:,}",
                f"{each.pieces:,}",
            )
            for kind, of_kind in found.items()
            for name, each in of_kind.items()
        ),
        "Below 0 where the model is better than the one that it is compared with. Intervals by "
        "bootstrap over documents hold the sample of text, not the seed of training.",
    )
