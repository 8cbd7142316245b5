"""Prints plans as tables, with the settings to change if a run does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.terminal import Table, print_table, say

_STAGE_COLUMNS = ("fits", "peak GiB", "HBM GiB", "PFLOP", "sent GB", "s", "MFU")
_RUN_COLUMNS = ("chips", "EFLOP", "days", "chip-hours", "cost", "without teacher", "teacher adds")


def print_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    """Prints the plans of summary.json."""
    print_table(
        Table(
            "A step, as compiled (seconds and MFU are estimates)",
            ("topology", "stage", *_STAGE_COLUMNS),
            tuple(_stage_row(plan, stage) for plan in plans for stage in plan["stages"]),
        )
    )
    print_table(
        Table(
            "The run, estimated",
            ("topology", *_RUN_COLUMNS),
            tuple(_run_row(plan) for plan in plans),
        )
    )
    for plan in plans:
        for stage in plan["stages"]:
            _say_stage(plan, stage)
        for labels in (plan.get("stored_labels"), plan.get("read_labels")):
            if labels:
                say(f"{plan['topology']}: {labels['advice']}")
        _say_change(plan)
        _say_faster(plan)


def _stage_row(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> tuple[str, ...]:
    shown = stage["change"] or stage
    sent = shown.get("collective_bytes_per_step")
    fits = "?" if stage["fits"] is None else "yes" if stage["fits"] else "no"
    return (
        plan["topology"],
        f"{stage['stage']} {'distil' if stage['stage'] == 1 else 'plain'}",
        fits + ("*" if stage["change"] else ""),
        _number(shown["peak_hbm_gib"], ".2f"),
        _number(plan["hbm_gib"], ".2f"),
        _count(stage["flops_per_step"] / 1e15),
        _number(None if sent is None else sum(sent.values()) / 1e9, ",.1f"),
        _number(shown.get("step_seconds_estimate"), ".3g"),
        _number(shown.get("mfu_estimate"), ".0%"),
    )


def _run_row(plan: Mapping[str, Any]) -> tuple[str, ...]:
    run = plan["run"]
    return (
        plan["topology"],
        str(plan["chips"]),
        _count(run["flops"] / 1e18),
        _number(run["days"], ".2f"),
        _number(run["chip_hours"], ",.0f"),
        _number(run["cost"], ",.0f"),
        _number(run["baseline_days"], ".2f"),
        _number(run["teacher_overhead"], "+.1%"),
    )


def _say_stage(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
    where, shown = f"{plan['topology']}, stage {stage['stage']}", stage["change"] or stage
    if stage["fits"] is False:
        needs = stage["needed_gib"]
        amount = "more" if needs is None else f"{needs:.2f} GiB"
        say(f"{where} needs {amount} and has {_number(plan['hbm_gib'], '.2f')} GiB.")
    elif stage["fits"] is None:
        say(f"{where}: the memory of {plan['device_kind']} is not known: add --hbm_gib=GIB.")
    if parts := shown.get("breakdown_gib"):
        listed = (f"{name} {gib:.2f}" for name, gib in parts.items() if gib > 0.005)
        say(f"{where}, GiB: {', '.join(listed)}")
    if unread := shown.get("unread"):
        say(f"{where}: what it sends and how long it takes is not known. {unread}")


def _say_change(plan: Mapping[str, Any]) -> None:
    stages = plan["stages"]
    tried = sum(len(stage["tried"]) for stage in stages)
    if all(stage["fits"] is not False for stage in stages):
        return
    if change := stages[0]["change"]:
        say(f"* It fits, as shown, with {change['flags']}")
    elif tried:
        say(f"  None of the {tried} changes tried makes it fit: more chips, or a smaller model.")
    else:
        say("  There is no setting left to change: more chips, or a smaller model.")


def _say_faster(plan: Mapping[str, Any]) -> None:
    faster = plan.get("faster")
    if not faster or not faster["settings"]:
        return
    steps = ", ".join(
        f"stage {stage['stage']} {stage['step_seconds_estimate']:.3g} s a step, "
        f"{stage['peak_hbm_gib']:.2f} GiB"
        for stage in faster["stages"]
    )
    days = f"{faster['run']['days']:.2f} days instead of {plan['run']['days']:.2f}"
    say(f"{plan['topology']}: idle memory makes it faster with {faster['flags']}: {steps}; {days}.")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
