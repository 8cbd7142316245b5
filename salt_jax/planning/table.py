"""Plans in; a table for a terminal out."""

from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.terminal import Table, print_table, say


def print_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    """Prints summary.json's plans as tables, and what to change where a stage does not fit."""
    print_table(
        Table(
            "A step, as compiled (seconds and MFU are estimates)",
            (
                *("topology", "stage", "fits", "peak GiB", "HBM GiB", "PFLOP", "sent GB", "s"),
                "MFU",
            ),
            tuple(_stage_row(plan, stage) for plan in plans for stage in plan["stages"]),
        )
    )
    print_table(
        Table(
            "The run, estimated",
            (
                *("topology", "chips", "EFLOP", "days", "chip-hours", "without teacher"),
                "teacher adds",
            ),
            tuple(_run_row(plan) for plan in plans),
        )
    )
    for plan in plans:
        for note in _notes(plan):
            say(note)


def _stage_row(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> tuple[str, ...]:
    change = stage["change"]
    shown = change or stage
    sent = shown.get("collective_bytes_per_step")
    return (
        plan["topology"],
        f"{stage['stage']} {'distil' if stage['stage'] == 1 else 'plain'}",
        _verdict(stage),
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
        _number(run["baseline_days"], ".2f"),
        _number(run["teacher_overhead"], "+.1%"),
    )


def _verdict(stage: Mapping[str, Any]) -> str:
    if stage["fits"] is None:
        return "?"
    return ("yes" if stage["fits"] else "no") + ("*" if stage["change"] else "")


def _notes(plan: Mapping[str, Any]) -> list[str]:
    notes = []
    for stage in plan["stages"]:
        where = f"{plan['topology']}, stage {stage['stage']}"
        if stage["fits"] is False:
            needs = stage.get("peak_hbm_gib") or stage["needed_gib"]
            amount = "more" if needs is None else f"{needs:.2f} GiB"
            notes.append(f"{where} needs {amount} and has {_number(plan['hbm_gib'], '.2f')} GiB.")
        elif stage["fits"] is None:
            notes.append(
                f"{where}: the memory of {plan['device_kind']} is not known; say it with --hbm_gib."
            )
        parts = (stage["change"] or stage).get("breakdown_gib")
        if parts:
            listed = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items() if gib > 0.005)
            notes.append(f"{where}, GiB: {listed}")
    if stored := plan.get("stored_labels"):
        notes.append(f"{plan['topology']}: {stored['advice']}")
    if read := plan.get("read_labels"):
        notes.append(f"{plan['topology']}: {read['advice']}")
    return [*notes, *_advice(plan)]


def _advice(plan: Mapping[str, Any]) -> list[str]:
    stages = plan["stages"]
    if all(stage["fits"] is not False for stage in stages):
        return []
    change = stages[0]["change"]
    if change is not None:
        return [f"* It fits, as shown, with {change['flags']}"]
    tried = sum(len(stage["tried"]) for stage in stages)
    if tried:
        return [
            f"  None of the {tried} changes tried makes it fit: more chips, or a smaller model."
        ]
    return [
        "  There is nothing to change that was not there already: more chips, or a smaller model."
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
