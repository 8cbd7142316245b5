"""UL2's objectives (arXiv 2205.05131), applied to packed rows.

Each row read gets one objective at random: causal, prefix or span corruption. The result is a
function of (seed, row id, epoch): the same on any host and in any thread, and different the next
time the row is read. Evaluation and scoring don't use objectives.

A row of one segment, L = 12, modes R 100, S 101 and X 102, sentinels from 103 on, padding 0:

    targets             5  6  7  8  9 10 11 12 13 14 15 16
    loss_weights        0  1  1  1  1  1  1  1  1  1  1  1

Causal leaves it unchanged. Prefix prepends [S], drops the last token to make room, and trains on
what follows a position drawn uniformly, here after four tokens:

    targets           101  5  6  7  8  9 10 11 12 13 14 15
    loss_weights        0  0  0  0  0  1  1  1  1  1  1  1
    context             1  1  1  1  1  1  0  0  0  0  0  0

Span corruption replaces spans by sentinels and appends each span after its sentinel; the appended
part is trained on. To make room, the row's tail is dropped before spans are drawn. Of twelve tokens
SpanDenoiser("R", mean_span=2, rate=0.4) keeps seven, three of them in two spans, here [7] and
[10 11]:

    targets           100  5  6 103  8  9 104 103  7 104 10 11
    loss_weights        0  0  0   0  0  0   0   1  1   1  1  1
    context             1  1  1   1  1  1   1   1  0   0  0  0

Up to two leftover positions become padding, segment 0. `context` marks the positions whose inputs
belong to the part without loss: with Objectives.bidirectional_prefix they attend to one another.

Each segment of a row is transformed by itself and keeps its place and length; one too short to be
split or corrupted is unchanged. Tokens that are trained on keep their loss weight; sentinels get 1.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from salt_jax.data import features
from salt_jax.data.abstract_vocabulary import MODES, Vocabulary
from salt_jax.errors import InputError

TEACHER_OBJECTIVES = ("all", "causal")

# Indices of the weights.
_CAUSAL, _SPAN = 0, 2


@dataclasses.dataclass(frozen=True)
class SpanDenoiser:
    """One way to corrupt spans.

    Attributes:
      mode: The mode token: "R" for short spans and a low rate, "X" for others.
      mean_span: µ, tokens; a row gets rate · tokens / µ spans, at least one, of random lengths.
      rate: The share of tokens corrupted, between 0 and 1.
    """

    mode: Literal["R", "X"]
    mean_span: float
    rate: float

    def __post_init__(self) -> None:
        if self.mode not in ("R", "X"):
            raise InputError(f"SpanDenoiser.mode is {self.mode!r}: choose 'R' or 'X'.")
        if not 0 < self.rate < 1:
            raise InputError(f"SpanDenoiser.rate is {self.rate}: set it between 0 and 1.")
        if not 1 <= self.mean_span < math.inf:
            raise InputError(f"SpanDenoiser.mean_span is {self.mean_span}: set it to at least 1.")


# The R and X denoisers of UL2's table 1.
UL2_DENOISERS = (
    SpanDenoiser("R", 3, 0.15),
    SpanDenoiser("R", 8, 0.15),
    SpanDenoiser("X", 3, 0.5),
    SpanDenoiser("X", 8, 0.5),
    SpanDenoiser("X", 64, 0.15),
    SpanDenoiser("X", 64, 0.5),
)


@dataclasses.dataclass(frozen=True)
class Objectives:
    """How often each objective is used.

    Attributes:
      causal: Weight of next-token prediction, by default 60%.
      prefix: Weight of prefix language modelling (UL2's S denoiser), by default 20%.
      span: Weight of span corruption, by default 20%. Only the proportions of the three matter.
      denoisers: The span denoisers, chosen with equal probability.
      mode_tokens: Whether a denoised segment begins with its mode's token. Causal ones never do.
      bidirectional_prefix: Whether attention within the part without loss (the prefix, the
        corrupted text) is bidirectional; needs attention_backend "xla" (or "auto", which picks it).
    """

    causal: float = 0.6
    prefix: float = 0.2
    span: float = 0.2
    denoisers: Sequence[SpanDenoiser] = UL2_DENOISERS
    mode_tokens: bool = True
    bidirectional_prefix: bool = False

    @property
    def uses_reserved_ids(self) -> bool:
        """Whether some rows get mode tokens or sentinels."""
        return bool(self.span or (self.prefix and self.mode_tokens))

    def __post_init__(self) -> None:
        weights = (self.causal, self.prefix, self.span)
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise InputError(
                f"Objectives got causal {self.causal}, prefix {self.prefix} and span {self.span}: "
                "weights can't be negative, and one must be over 0."
            )
        if self.span and not self.denoisers:
            raise InputError(
                f"Objectives.span is {self.span} and there are no denoisers: set "
                "Objectives.denoisers, or span to 0."
            )


class DenoisedRow(NamedTuple):
    """A row to train on."""

    row: features.Row
    is_causal: bool  # whether next-token prediction was drawn for it
    context: np.ndarray  # bool[L], positions whose inputs belong to the part without loss


class Denoising:
    """Applies objectives to the rows of one run.

    Args:
      objectives: The objectives and their weights.
      vocabulary: Its reserved ids are the mode tokens and sentinels.
      sequence_length: L, tokens of a row.
      seed: The seed of the draws for each row.
      teacher_objectives: "causal" for a teacher not trained on modes and sentinels: batches then
        have `distill`, float32[B], 1 for rows it teaches (the causal ones) and 0 for others. "all"
        lets it teach all rows.
    """

    def __init__(
        self,
        objectives: Objectives,
        vocabulary: Vocabulary,
        sequence_length: int,
        seed: int,
        teacher_objectives: str = "all",
    ) -> None:
        self.features = feature_names(objectives, teacher_objectives)
        _require_fit(objectives, vocabulary, sequence_length)
        self._objectives, self._seed = objectives, seed
        self._teacher_objectives = teacher_objectives
        self._pad_id = vocabulary.pad_id
        ids = vocabulary.mode_ids if objectives.mode_tokens else {}
        self._modes = {m: np.array([ids[m]] if m in ids else [], np.int32) for m in MODES}
        self._sentinels = np.array(vocabulary.sentinel_ids, np.int32)
        self._bounds = np.cumsum([objectives.causal, objectives.prefix, objectives.span])

    @property
    def identity(self) -> dict[str, Any]:
        """What determines how rows are changed, as JSON values."""
        settings = dataclasses.asdict(self._objectives)
        settings["denoisers"] = [*settings["denoisers"]]
        return {**settings, "teacher_objectives": self._teacher_objectives, "seed": self._seed}

    def __call__(self, row: features.Row, epoch: int) -> DenoisedRow:
        """The row as trained on in an epoch, counted from 0."""
        rng = np.random.Generator(np.random.PCG64((self._seed, int(row["row_id"]), epoch)))
        drawn = int(np.searchsorted(self._bounds, rng.random() * self._bounds[-1], side="right"))
        context_L = np.zeros(len(row["targets"]), bool)
        if drawn == _CAUSAL:
            return DenoisedRow(row, True, context_L)
        denoisers = self._objectives.denoisers if drawn == _SPAN else ()
        denoiser = denoisers[int(rng.random() * len(denoisers))] if denoisers else None
        targets_L, weights_L = row["targets"].copy(), row["loss_weights"].copy()
        segment_ids_L = row["segment_ids"].copy()
        for begin, end in _segments(segment_ids_L):
            tokens_S, kept_weights_S = targets_L[begin:end], weights_L[begin:end]
            if denoiser is None:
                changed = self._prefix(tokens_S, kept_weights_S, rng)
            else:
                changed = self._corrupted(tokens_S, kept_weights_S, denoiser, rng)
            if changed is None:
                continue
            new_S, new_weights_S, context = changed
            used = begin + len(new_S)
            targets_L[begin:used], targets_L[used:end] = new_S, self._pad_id
            weights_L[begin:used], weights_L[used:end] = new_weights_S, 0.0
            segment_ids_L[used:end] = 0
            # Inputs are targets shifted by one: the context's last token is read one position on.
            context_L[begin : begin + context + 1] = True
        changed_row = features.make_row(
            targets_L, weights_L, segment_ids_L, int(row["subset"]), int(row["row_id"])
        )
        return DenoisedRow(changed_row, False, context_L)

    def batch_features(self, rows: Sequence[DenoisedRow]) -> features.Batch:
        """The features that a batch has beside `features.make_batch`'s: `distill`, float32[B], and
        `bidirectional`, bool[B, L], each if it is in `features`."""
        made = {
            "distill": np.array([row.is_causal for row in rows], np.float32),
            "bidirectional": np.stack([row.context for row in rows]),
        }
        return {name: made[name] for name in self.features}

    def _prefix(
        self, tokens_S: np.ndarray, weights_S: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """(tokens, loss weights, context length); None if the segment is too short to split."""
        mode = self._modes["S"]
        size = len(tokens_S) - len(mode)
        if size < 2:
            return None
        split = 1 + int(rng.random() * (size - 1))
        context = len(mode) + split
        weights = np.concatenate([np.zeros(context, np.float32), weights_S[split:size]])
        return np.concatenate([mode, tokens_S[:size]]), weights, context

    def _corrupted(
        self,
        tokens_S: np.ndarray,
        weights_S: np.ndarray,
        denoiser: SpanDenoiser,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """As `_prefix`, by span corruption; None if there is no room for a span."""
        mode = self._modes[denoiser.mode]
        plan = _plan(len(tokens_S) - len(mode), denoiser)
        if plan is None:
            return None
        # Kept and corrupted runs alternate, a kept one first, as in T5's random_spans_noise_mask.
        kept_K = _random_parts(plan.size - plan.corrupted, plan.spans, rng)
        spans_K = _random_parts(plan.corrupted, plan.spans, rng)
        is_span_n = np.repeat(
            np.tile([False, True], plan.spans), np.stack([kept_K, spans_K], 1).flat
        )
        tokens_n, weights_n = tokens_S[: plan.size], weights_S[: plan.size]
        sentinels_K = self._sentinels[: plan.spans]
        text = np.insert(tokens_n[~is_span_n], np.cumsum(kept_K), sentinels_K)
        begins_K = np.cumsum(spans_K) - spans_K
        spans = np.insert(tokens_n[is_span_n], begins_K, sentinels_K)
        span_weights = np.insert(weights_n[is_span_n], begins_K, np.float32(1.0))
        context = len(mode) + len(text)
        weights = np.concatenate([np.zeros(context, np.float32), span_weights])
        return np.concatenate([mode, text, spans]), weights, context


def feature_names(objectives: Objectives, teacher_objectives: str) -> tuple[str, ...]:
    """The features that batches have beside `features.make_batch`'s; see Denoising."""
    if teacher_objectives not in TEACHER_OBJECTIVES:
        raise InputError(f"teacher_objectives is {teacher_objectives!r}: choose 'all' or 'causal'.")
    return (
        *(["distill"] if teacher_objectives == "causal" else []),
        *(["bidirectional"] if objectives.bidirectional_prefix else []),
    )


class _Plan(NamedTuple):
    """How a segment is corrupted: `size` tokens of it are kept, `corrupted` of them in `spans`."""

    size: int
    corrupted: int
    spans: int


@functools.lru_cache(maxsize=4096)
def _plan(room: int, denoiser: SpanDenoiser) -> _Plan | None:
    """The longest part of a segment that fits `room` positions once corrupted; None if not even two
    tokens fit."""
    low, high = 1, room  # bisection: `low` fits if anything does, `high` never
    while high - low > 1:
        middle = (low + high) // 2
        fits = middle + 2 * _spans(middle, denoiser).spans <= room
        low, high = (middle, high) if fits else (low, middle)
    return _spans(low, denoiser) if low >= 2 else None


def _spans(size: int, denoiser: SpanDenoiser) -> _Plan:
    """The plan for `size` >= 2 tokens."""
    corrupted = min(max(round(size * denoiser.rate), 1), size - 1)
    spans = max(round(corrupted / denoiser.mean_span), 1)
    return _Plan(size, corrupted, min(spans, corrupted, size - corrupted))


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive lengths that sum to `total`, uniformly at random."""
    if parts == 1:
        return np.array([total])
    # Uses only random(): its stream is the least likely to change between NumPy versions.
    cuts = np.sort(np.argpartition(rng.random(total - 1), parts - 2)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _segments(segment_ids_L: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each segment, without padding."""
    bounds = [0, *(np.flatnonzero(np.diff(segment_ids_L)) + 1).tolist(), len(segment_ids_L)]
    return [(begin, end) for begin, end in itertools.pairwise(bounds) if segment_ids_L[begin] > 0]


def _require_fit(objectives: Objectives, vocabulary: Vocabulary, sequence_length: int) -> None:
    """Refuses spans longer than rows, rows too short for a span, and too few reserved ids."""
    sentinels = 0
    for denoiser in objectives.denoisers if objectives.span else ():
        if denoiser.mean_span >= sequence_length or _plan(sequence_length - 1, denoiser) is None:
            raise InputError(
                f"SpanDenoiser.mean_span is {denoiser.mean_span} and rows have {sequence_length} "
                "tokens: use shorter spans in Objectives.denoisers, or prepare longer rows."
            )
        plan = _plan(sequence_length, denoiser)
        sentinels = max(sentinels, plan.spans if plan else 0)
    has_modes = objectives.mode_tokens and (objectives.prefix or objectives.span)
    needed = len(MODES) + sentinels if sentinels or has_modes else 0
    if vocabulary.reserved < needed:
        raise InputError(
            f"The objectives need {needed} reserved ids ({len(MODES)} modes and {sentinels} "
            f"sentinels for rows of {sequence_length} tokens) and the vocabulary has "
            f"{vocabulary.reserved}: prepare the cache with a vocabulary of reserved={needed} or "
            "more, or leave objectives unset."
        )
