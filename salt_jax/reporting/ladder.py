"""A ladder: the final loss of each arm against its train FLOPs over sizes of model.

    L(C) = E + a · (C / C₀)^-α      C₀: the geometric mean of the train FLOPs of all runs

a and α are an arm's own, and E, what no model could learn, is the text's and so the same for all
arms. They are fitted by least squares to the means over seeds, weighted by the number of seeds.
Three sizes can't carry E beside a and α: there it is 0, a straight line in logarithms.

An arm has the loss that the reference has after C FLOPs, u = ln(C / C₀), after

    C₀ · exp((ln(a / a_ref) + α_ref · u) / α)

of its own, and saves 1 minus their ratio. The ratio is a power of C, so its trend is one number:
the factor by which it changes where FLOPs grow tenfold.

95% bands are percentiles of fits to bootstrapped means: at each size as many seeds are drawn as
there are, the same for all arms, and the deviations of their means multiplied by √(n / (n - 1)),
as the means of n values drawn from n vary by (n - 1) / n of the variance.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize

from salt_jax.reporting.runs import TrainRun
from salt_jax.reporting.seeds import by_arm
from salt_jax.reporting.tables import NOTHING
from salt_jax.terminal import Table

SIZES_OF_A_LAW, SIZES_OF_LEAST_LOSS = 3, 4
FITS = 500

Floats = npt.NDArray[np.float64]


class Laws(NamedTuple):
    """E (nats), and ln a and α of each arm, [A], the reference first."""

    least: float
    level: Floats
    alpha: Floats

    def loss(self, arm: int, logs: Floats) -> Floats:
        """L of an arm at ln(C / C₀)."""
        return self.least + np.exp(self.level[arm] - self.alpha[arm] * logs)

    def log_ratio(self, arm: int, logs: Floats) -> Floats:
        """ln of the arm's FLOPs over the reference's, at equal loss, by the reference's FLOPs."""
        excess = self.level[arm] - self.level[0] + self.alpha[0] * logs
        return excess / self.alpha[arm] - logs


class Bands(NamedTuple):
    """Values with the ends of their 95% bands, which are NaN without several seeds."""

    values: Floats
    low: Floats
    high: Floats


@dataclasses.dataclass(frozen=True, eq=False)
class Ladder:
    """Arms over sizes, fitted.

    Attributes:
      arms: The reference first.
      sizes: Parameters of the models, S of them, ascending.
      seeds: Seeds of each size.
      centre: C₀.
      logs: ln(C / C₀), [A, S]; NaN where an arm has no run.
      nats: The final log-perplexity of each seed, [A, S, N].
      laws: The fit.
      fits: Those of the bootstrap; none if every size has one seed.
    """

    arms: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    centre: float
    logs: Floats
    nats: Floats
    laws: Laws
    fits: Sequence[Laws]

    def saving(self, arm: int, logs: Floats) -> Bands:
        """The shares of its FLOPs that the reference, having spent C₀ · exp(logs), would save."""
        return _bands([-np.expm1(laws.log_ratio(arm, logs)) for laws in self._all])

    def loss(self, arm: int, logs: Floats) -> Bands:
        """L at ln(C / C₀)."""
        return _bands([laws.loss(arm, logs) for laws in self._all])

    def trend(self, arm: int) -> Bands:
        """The factor by which the arm's share of the reference's FLOPs changes over a tenfold."""
        slopes = [laws.alpha[0] / laws.alpha[arm] - 1 for laws in self._all]
        return _bands([np.float64(10.0**slope) for slope in slopes])

    def alpha(self, arm: int) -> Bands:
        """α."""
        return _bands([laws.alpha[arm] for laws in self._all])

    def least(self) -> Bands:
        """E."""
        return _bands([np.float64(laws.least) for laws in self._all])

    @property
    def spent(self) -> tuple[float, float]:
        """The train FLOPs of the reference's smallest and largest size."""
        first, *_, last = self.centre * np.exp(self.logs[0])
        return float(first), float(last)

    @property
    def _all(self) -> list[Laws]:
        return [self.laws, *self.fits]

    def to_json(self) -> dict[str, Any]:
        """The numbers of summary.json; each band is [value, low, high]."""

        def plain(bands: Bands) -> list[Any]:
            return np.stack(bands, axis=-1).tolist()

        return {
            "sizes": self.sizes,
            "seeds": self.seeds,
            "least_loss": plain(self.least()),
            "arms": [
                {
                    "arm": name,
                    "train_flops": (self.centre * np.exp(self.logs[arm])).tolist(),
                    "log_perplexity": _means(self.nats)[arm].tolist(),
                    "exponent": plain(self.alpha(arm)),
                    "saving": plain(self.saving(arm, self.logs[0])),
                    "ratio_by_ten": plain(self.trend(arm)),
                }
                for arm, name in enumerate(self.arms)
            ],
        }


def ladders_of(
    runs: Sequence[TrainRun], reference: str
) -> list[tuple[tuple[int, ...], Ladder | None]]:
    """The reference's sizes and the ladder, for each cache that runs have finished on."""
    on_caches: dict[str | None, list[TrainRun]] = {}
    for run in runs:
        if run.finished:
            on_caches.setdefault(run.facts.get("cache_digest"), []).append(run)
    return [(sizes_of(own, reference), fit_ladder(own, reference)) for own in on_caches.values()]


def sizes_of(runs: Sequence[TrainRun], reference: str) -> tuple[int, ...]:
    """The numbers of parameters with which the reference has finished, ascending."""
    found = {run.parameters for run in runs if run.arm == reference and run.seed is not None}
    return tuple(sorted(size for size in found if size is not None))


def fit_ladder(runs: Sequence[TrainRun], reference: str) -> Ladder | None:
    """The laws of the reference and of every arm with three or more of its sizes, from runs on one
    cache; None if the reference has fewer."""
    sizes = sizes_of(runs, reference)
    groups = [by_arm([run for run in runs if run.parameters == size]) for size in sizes]
    counts = collections.Counter(itertools.chain(*groups))
    arms = [arm for arm, count in counts.items() if count >= SIZES_OF_A_LAW]
    if reference not in arms:
        return None
    arms = [reference, *(arm for arm in arms if arm != reference)]
    seeds = sorted({seed for group in groups for found in group.values() for seed in found})
    nats_AxSxN, flops_AxSxN = np.full((2, len(arms), len(sizes), len(seeds)), np.nan)
    for (arm, name), (size, group) in itertools.product(enumerate(arms), enumerate(groups)):
        for seed, run in group.get(name, {}).items():
            at = arm, size, seeds.index(seed)
            assert run.final is not None, "a finished run has its final evaluation"
            nats_AxSxN[at], flops_AxSxN[at] = run.final[["log_perplexity", "train_flops"]]
    logs_AxS = np.log(_means(flops_AxSxN))
    centre = float(np.nanmean(logs_AxS))
    logs_AxS -= centre
    has_least = len(sizes) >= SIZES_OF_LEAST_LOSS
    weights_AxS = np.isfinite(nats_AxSxN).sum(axis=2)
    means_AxS, few_A = _means(nats_AxSxN), np.full(len(arms), 0.1)
    start = Laws(0.5 * float(np.nanmin(means_AxS)), few_A, few_A)
    laws = _fit(logs_AxS, means_AxS, weights_AxS, has_least, start)
    return Ladder(
        arms=tuple(arms),
        sizes=sizes,
        seeds=tuple(int(np.isfinite(n).any(axis=0).sum()) for n in nats_AxSxN.transpose(1, 0, 2)),
        centre=math.exp(centre),
        logs=logs_AxS,
        nats=nats_AxSxN,
        laws=laws,
        fits=[
            _fit(logs_AxS, drawn_AxS, weights_AxS, has_least, laws)
            for drawn_AxS in _bootstrapped(nats_AxSxN)
        ],
    )


def ladder_table(ladder: Ladder) -> Table:
    """Every arm's exponent, and what it saves at each size."""

    def row(arm: int) -> Iterator[str]:
        yield ladder.arms[arm]
        yield _format(ladder.alpha(arm), 1, 3)
        if arm == 0:
            yield from [NOTHING] * (len(ladder.sizes) + 1)
            return
        for at, log in enumerate(ladder.logs[0]):
            there = np.isfinite(ladder.logs[arm, at])
            yield _format(ladder.saving(arm, log), 100, 1, "%", 0.0) if there else NOTHING
        yield _format(ladder.trend(arm), 1, 3, "", 1.0)

    reference, seeds = ladder.arms[0], sorted({*ladder.seeds})
    of_seeds = f"With 95% bands by bootstrap over {' or '.join(map(str, seeds))} seeds of a size"
    return Table(
        title=f"FLOPs saved to reach the loss of {reference}, by its parameters",
        columns=("arm", "α", *(f"{size:,}" for size in ladder.sizes), "ratio where FLOPs × 10"),
        rows=tuple(tuple(row(arm)) for arm in range(len(ladder.arms))),
        note=f"{'One seed a size, so no bands' if seeds == [1] else of_seeds}; * marks bands that "
        "exclude 0, and in the last column 1. That is the factor by which an arm's share of "
        f"{reference}'s FLOPs changes where these grow tenfold: below 1 it saves more as models "
        "grow.",
    )


def _format(bands: Bands, scale: int, digits: int, unit: str = "", null: float = math.nan) -> str:
    """21.8% [19.2, 23.9] *"""
    value, low, high = (f"{scale * float(each):.{digits}f}" for each in bands)
    if not np.isfinite(bands.low):
        return value + unit
    clear = bands.low > null or bands.high < null
    return f"{value}{unit} [{low}, {high}]" + " *" * bool(clear)


def _means(values_AxSxN: Floats) -> Floats:
    """Means over the last axis of the values that are there; NaN for none."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values_AxSxN, axis=-1) / np.isfinite(values_AxSxN).sum(axis=-1)


def _bootstrapped(nats_AxSxN: Floats) -> Iterator[Floats]:
    """FITS tables of means over drawn seeds, [A, S]; none if no size has several seeds."""
    seeds_S = [
        np.flatnonzero(np.isfinite(n_AxN).any(axis=0)) for n_AxN in nats_AxSxN.swapaxes(0, 1)
    ]
    if max(map(len, seeds_S)) < 2:
        return
    means_AxS, generator = _means(nats_AxSxN), np.random.default_rng(0)
    for _ in range(FITS):
        drawn_AxS = means_AxS.copy()
        for size, seeds in enumerate(seeds_S):
            if len(seeds) > 1:
                drawn = generator.choice(seeds, len(seeds))
                deviation_A = _means(nats_AxSxN[:, size, drawn]) - means_AxS[:, size]
                drawn_AxS[:, size] += math.sqrt(len(seeds) / (len(seeds) - 1)) * deviation_A
        yield drawn_AxS


def _fit(
    logs_AxS: Floats, nats_AxS: Floats, weights_AxS: Floats, has_least: bool, start: Laws
) -> Laws:
    """The laws with the least weighted sum of squares."""
    arm, size = np.nonzero(np.isfinite(nats_AxS))
    logs, nats, roots = logs_AxS[arm, size], nats_AxS[arm, size], np.sqrt(weights_AxS[arm, size])
    count = len(nats_AxS)

    def laws_of(x: Floats) -> Laws:
        least, rest = (float(x[0]), x[1:]) if has_least else (0.0, x)
        return Laws(least, rest[:count], rest[count:])

    def residuals(x: Floats) -> Floats:
        laws = laws_of(x)
        excess = np.exp(laws.level[arm] - laws.alpha[arm] * logs)
        return roots * (laws.least + excess - nats)

    def slopes(x: Floats) -> Floats:
        laws = laws_of(x)
        excess = roots * np.exp(laws.level[arm] - laws.alpha[arm] * logs)
        own = np.equal.outer(arm, np.arange(count)) * excess[:, None]
        return np.hstack([roots[:, None]] * has_least + [own, -own * logs[:, None]])

    inside = 0.999 * float(np.min(nats))
    first = [*([min(start.least, inside)] * has_least), *start.level, *start.alpha]
    low = np.full(len(first), -np.inf)
    high = -low
    if has_least:
        low[0], high[0] = 0.0, inside
    found = scipy.optimize.least_squares(residuals, first, slopes, (low, high), x_scale="jac")
    return laws_of(found.x)


def _bands(found: Sequence[Any]) -> Bands:
    """The first of the arrays, and the bands of the others."""
    if len(found) == 1:
        nothing = np.full(np.shape(found[0]), np.nan)
        return Bands(found[0], nothing, nothing)
    return Bands(found[0], *np.quantile(found[1:], [0.025, 0.975], axis=0))
