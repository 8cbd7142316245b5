"""The tables of arms over seeds.

In: what `seeds.over_seeds` gives. Out: Table.
"""

import math
from collections.abc import Sequence

from salt_jax.reporting.comparison import Axis
from salt_jax.reporting.seeds import ArmOverSeeds, Compared, Estimate
from salt_jax.reporting.tables import NOTHING, format_cost
from salt_jax.terminal import Table

_NOTE = (
    "Means over seeds ± the half-width of a 95% interval (Student's t). Δ is the mean of the "
    "differences to {reference} seed by seed; * marks one whose interval leaves out 0."
)


def final_seeds_table(arms: Sequence[ArmOverSeeds], reference: str) -> Table:
    """Every arm at the end of its runs."""
    return Table(
        title="Over seeds, at the end of each run",
        columns=(*_columns(reference), f"reaches {reference}'s end after"),
        rows=tuple(
            (*_row(one, one.final), _reaching(one) if one.arm != reference else NOTHING)
            for one in arms
        ),
        note=f"{_NOTE.format(reference=reference)} The last column: the share of {reference}'s "
        f"steps after which an arm's log-perplexity is {reference}'s at its end, and how many "
        "seeds get there; an arm's learning rate is then still to fall.",
    )


def equal_cost_table(
    arms: Sequence[ArmOverSeeds], axis: Axis, value: float, reference: str
) -> Table:
    """Every arm at one common cost.

    Args:
      arms: All of them have `axis` in at_equal.
      axis: The cost.
      value: Its value.
      reference: What the differences are to.
    """
    return Table(
        title=f"Over seeds, at equal {axis.title}: {format_cost(axis, value)}",
        columns=_columns(reference),
        rows=tuple(_row(one, one.at_equal[axis.name]) for one in arms),
        note=f"{_NOTE.format(reference=reference)} {NOTHING}: more than that was spent before the "
        "first evaluation.",
    )


def _columns(reference: str) -> tuple[str, ...]:
    delta = f"Δ to {reference}"
    return ("arm", "seeds", "log-perplexity", delta, "next-token accuracy", delta)


def _row(one: ArmOverSeeds, by_metric: dict[str, Compared]) -> tuple[str, ...]:
    nats, share = by_metric["log_perplexity"], by_metric["next_token_accuracy"]
    seeds = str(len(one.seeds))
    return (
        one.arm,
        seeds if nats.level.count == len(one.seeds) else f"{nats.level.count} of {seeds}",
        _format(nats.level),
        _format_difference(nats.difference),
        _format(share.level, percent=True),
        _format_difference(share.difference, percent=True),
    )


def _reaching(one: ArmOverSeeds) -> str:
    count = f"{one.seeds_that_got_there} of {len(one.seeds)}"
    if not one.seeds_that_got_there:
        return count
    return f"{_format(one.steps_to_reference, percent=True, digits=0)} ({count})"


def _format(
    estimate: Estimate, percent: bool = False, digits: int | None = None, sign: str = ""
) -> str:
    """3.594 ± 0.012, or 32.14 ± 0.20%."""
    if not math.isfinite(estimate.mean):
        return NOTHING
    scale, unit = (100.0, "%") if percent else (1.0, "")
    places = (2 if percent else 4) if digits is None else digits
    text = f"{estimate.mean * scale:{sign}.{places}f}"
    if math.isfinite(estimate.half_width):
        text += f" ± {estimate.half_width * scale:.{places}f}"
    return text + unit


def _format_difference(estimate: Estimate | None, percent: bool = False) -> str:
    if estimate is None:
        return NOTHING
    clear = abs(estimate.mean) > estimate.half_width  # false for NaN
    return _format(estimate, percent, sign="+") + (" *" if clear else "")
