"""The account of wall time: its parts add up, and a killed start's steps are lost."""

import jax
import pytest

from salt_jax.training.wall_time import PARTS, WallTime
from tests.training.doubles import Clock


def run_a_little(clock: Clock, account: WallTime) -> None:
    """3 s of start, 5 s of compiling, 2 s for rows, 10 s of steps, 4 s for a save, 1 s of steps."""
    clock.now += 3.0
    with account.spent_on("compile"):
        clock.now += 5.0
    account.begin_steps()
    clock.now += 2.0
    account.lap("rows")
    clock.now += 10.0
    with account.spent_on("save"):
        clock.now += 4.0
    clock.now += 1.0
    account.lap("steps")


def parts_of(account: WallTime) -> dict[str, float]:
    return {part: seconds for part, seconds in account.seconds.items() if seconds}


def test_every_moment_is_in_one_part(clock: Clock) -> None:
    account = WallTime(began=90.0, chips=8, price=2.0)
    run_a_little(clock, account)
    expected = {"start": 13.0, "compile": 5.0, "rows": 2.0, "steps": 11.0, "save": 4.0}
    assert parts_of(account) == expected
    found = account.to_json(seconds_left=3600.0)
    assert found["wall_seconds"] == clock.now - 90.0
    assert sum(found[f"{part}_seconds"] for part in PARTS) == found["wall_seconds"]
    assert found["goodput"] == 11 / 35
    assert found["chip_hours"] == 8 * 35 / 3600
    assert found["cost"] == 2 * found["chip_hours"]
    assert found["cost_at_end"] == pytest.approx(found["cost"] + 2 * 8)


def test_what_xla_compiles_elsewhere_counts_as_compiling(clock: Clock) -> None:
    with WallTime(began=100.0, chips=1, price=None) as account:
        clock.now += 6.0
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 4.0)
        jax.monitoring.record_event_duration_secs("/jax/another/duration", 1.0)
        account.lap("restore")
        clock.now += 2.0  # several threads may compile for longer than the time that passes
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9.0)
        account.lap("steps")
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 7.0)
    clock.now += 1.0
    account.lap("steps")
    assert parts_of(account) == {"compile": 6.0, "restore": 2.0, "steps": 1.0}


def test_steps_after_the_checkpoint_are_lost(clock: Clock) -> None:
    first = WallTime(began=100.0, chips=8, price=None)
    run_a_little(clock, first)
    saved = first.to_json()
    clock.now += 7.0
    first.lap("steps")
    recorded = first.to_json()
    second = WallTime(began=clock.now, chips=4, price=None)
    second.resume(saved, recorded)
    run_a_little(clock, second)
    found = second.to_json()
    assert (found["steps_seconds"], found["lost_steps_seconds"]) == (22.0, 7.0)
    assert found["wall_seconds"] == 25 + 7 + 25
    assert found["chip_hours"] == pytest.approx((8 * 32 + 4 * 25) / 3600)
    assert found["starts"] == 2


def test_a_checkpoint_newer_than_the_last_record_is_what_counts(clock: Clock) -> None:
    first = WallTime(began=100.0, chips=1, price=None)
    clock.now += 1.0
    first.lap("start")
    recorded = first.to_json()
    run_a_little(clock, first)
    second = WallTime(began=clock.now, chips=1, price=None)
    second.resume(first.to_json(), recorded)
    assert (second.seconds["steps"], second.seconds["lost_steps"]) == (11.0, 0.0)


def test_without_a_checkpoint_all_steps_are_lost(clock: Clock) -> None:
    first = WallTime(began=100.0, chips=1, price=None)
    run_a_little(clock, first)
    second = WallTime(began=clock.now, chips=1, price=None)
    second.resume(None, first.to_json())
    assert (second.seconds["steps"], second.seconds["lost_steps"]) == (0.0, 11.0)
