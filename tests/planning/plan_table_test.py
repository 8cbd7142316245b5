"""The table says what summary.json does, for stages that fit and for those that don't."""

from typing import Any

import pytest

from salt_jax.planning.plan_table import print_plans


def plan_of(**stage: Any) -> dict[str, Any]:
    measured = {
        "peak_hbm_gib": 9.25,
        "needed_gib": 9.25,
        "breakdown_gib": {"student": 0.5, "loss": 8.75, "batch": 0.001},
        "collective_bytes_per_step": {"all-gather": 2e9, "all-reduce": 1.5e9},
        "step_seconds_estimate": 2.0,
        "mfu_estimate": 0.5,
    }
    stage = {
        **{"stage": 1, "fits": True, "flops_per_step": 5.447e16, "change": None, "tried": []},
        **measured,
        **stage,
    }
    if stage["change"] is not None:
        stage["change"] = {**measured, **stage["change"]}
    run = {"flops": 1.007e22, "days": 4.834, "chip_hours": 29650.0, "baseline_days": 4.7}
    run |= {"teacher_overhead": 0.026, "cost": 35580.0}
    return {
        **{"topology": "v5e:16x16", "chips": 256, "hbm_gib": 15.75},
        **{"stages": [stage], "run": run},
    }


def test_a_stage_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    print_plans([plan_of()])
    printed = capsys.readouterr().out
    shown = ("1 distil", "yes", "9.25", "15.75", "54.5", "3.5", "50%", "10,070", "4.83", "29,650")
    shown += ("35,580",)
    for text in (*shown, "+2.6%", "GiB: student 0.50, loss 8.75\n"):
        assert text in printed, text


def test_a_stage_that_fits_with_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    change = {"flags": "--gin.config.Devices.microbatches=2", "peak_hbm_gib": 8.5}
    print_plans([plan_of(fits=False, peak_hbm_gib=None, needed_gib=22.25, change=change)])
    printed = capsys.readouterr().out
    assert "no*" in printed
    assert "needs 22.25 GiB and has 15.75 GiB" in printed
    assert "8.50" in printed
    assert "It fits, as shown, with --gin.config.Devices.microbatches=2\n" in printed


def test_memory_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    plan = {**plan_of(fits=None), "hbm_gib": None, "device_kind": "cpu"}
    print_plans([plan])
    printed = capsys.readouterr().out
    assert printed.splitlines()[4].split()[3] == "?"
    assert "the memory of cpu is not known: add --hbm_gib=GIB" in printed
    assert "It fits" not in printed


def test_a_stage_that_nothing_helps(capsys: pytest.CaptureFixture[str]) -> None:
    lacking = {"breakdown_gib": None, "collective_bytes_per_step": None, "mfu_estimate": None}
    stage = plan_of(fits=False, peak_hbm_gib=None, needed_gib=None, tried=[{}, {}], **lacking)
    print_plans([stage])
    printed = capsys.readouterr().out
    assert "needs more" in printed
    assert "None of the 2 changes tried makes it fit" in printed


def test_what_cannot_be_read_has_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = dict.fromkeys(
        ("collective_bytes_per_step", "step_seconds_estimate", "mfu_estimate"), None
    )
    print_plans([plan_of(unread="Line 7 of the program is not understood: '?'.", **unknown)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[4].split() == [
        *("v5e:16x16", "1", "distil", "yes", "9.25", "15.75", "54.5")
    ]
    assert "takes is not known. Line 7 of the program is not understood: '?'.\n" in printed


def test_idle_memory(capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"stage": 2, "step_seconds_estimate": 1.393, "peak_hbm_gib": 8.25}
    faster = {"settings": {"x": 1}, "flags": "--x=1", "stages": [stage], "run": {"days": 4.0}}
    print_plans([{**plan_of(), "faster": faster}])
    assert (
        "v5e:16x16: idle memory makes it faster with --x=1: stage 2 1.39 s a step, 8.25 GiB; "
        "4.00 days instead of 4.83.\n"
    ) in capsys.readouterr().out
    print_plans([{**plan_of(), "faster": {"settings": {}, "tried": [{}]}}])
    assert "idle" not in capsys.readouterr().out
