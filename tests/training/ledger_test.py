"""The ledger: what is counted where, by a clock that the test turns."""

import dataclasses
from typing import Any

import pytest

from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import flops
from salt_jax.training.ledger import Cost, Counters, Ledger, known_cost
from tests.training.doubles import Clock

STUDENT = DecoderConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, vocab_size=100)
TEACHER = dataclasses.replace(STUDENT, embed_dim=16)
SCORING = Cost(flops=40.0, tokens=20, seconds=3.0)
METRICS = {"loss": 2.0, "hard": 1.0, "weight": 90.0, "skipped_updates": 0}


def make_ledger(scoring: Cost = SCORING, peak_flops: float | None = 1000.0) -> Ledger:
    return Ledger(
        student=Cost(flops=600.0, tokens=100),
        teacher=Cost(flops=90.0, tokens=100),
        evaluation=Cost(flops=50.0, tokens=7),
        scoring=scoring,
        peak_flops=peak_flops,
    )


def run_a_little(clock: Clock, book: Ledger) -> None:
    """Compiles for 9 s, two steps of stage 1 take 4 s, an evaluation 5 s, a step of stage 2 1 s."""
    with book.compiling():
        clock.now += 9.0
    book.start_clock()
    for _ in range(2):
        clock.now += 2.0
        book.add(METRICS, stage=1)
    with book.evaluating():
        clock.now += 5.0
    book.start_clock()
    clock.now += 1.0
    book.add(METRICS, stage=2)


def test_everything_is_counted_in_its_own_place(clock: Clock) -> None:
    book = make_ledger()
    run_a_little(clock, book)
    assert book.counters == Counters(
        student_flops=1800.0,
        teacher_flops=180.0,
        scoring_flops=40.0,
        evaluation_flops=50.0,
        stage1_tokens=200,
        stage2_tokens=100,
        scoring_tokens=20,
        evaluation_tokens=7,
        stage1_seconds=4.0,
        stage2_seconds=1.0,
        scoring_seconds=3.0,
        evaluation_seconds=5.0,
        compile_seconds=9.0,
    )


def test_a_run_is_charged_for_its_scoring_but_not_for_evaluation_and_compiling(
    clock: Clock,
) -> None:
    book = make_ledger()
    run_a_little(clock, book)
    shown = book.counters.to_json()
    assert (shown["train_flops"], shown["seconds"]) == (1800.0 + 180.0 + 40.0, 4.0 + 1.0 + 3.0)
    assert shown["tokens"] == 300
    assert shown.keys() >= {field.name for field in dataclasses.fields(Counters)}


def test_mfu_is_of_the_window(clock: Clock) -> None:
    """Student and teacher over the peak, in the steps' own time: nothing of scoring, evaluation or
    of the window before."""
    book = make_ledger(Cost(flops=1e9, tokens=20, seconds=3.0))
    run_a_little(clock, book)
    assert book.close_window()["mfu"] == pytest.approx((1800.0 + 180.0) / 5.0 / 1000.0)
    clock.now += 4.0
    book.add(METRICS, stage=2)
    record = book.close_window()
    assert record["mfu"] == pytest.approx(600.0 / 4.0 / 1000.0)
    assert record["tokens_per_second"] == pytest.approx(25.0)


def test_mfu_is_null_where_the_peak_is_not_known(clock: Clock) -> None:
    book = make_ledger(peak_flops=None)
    run_a_little(clock, book)
    assert book.close_window()["mfu"] is None


def test_costs_of_models() -> None:
    trained = 128 * flops.train_flops_per_token(STUDENT, 16)
    assert Cost.of_training(STUDENT, 8, 16) == Cost(flops=trained, tokens=128)
    forward = 48 * flops.forward_flops_per_token(TEACHER, 16)
    assert Cost.of(TEACHER, 3, 16, 2.5) == Cost(flops=forward, tokens=48, seconds=2.5)


def test_counters_survive_a_checkpoint() -> None:
    counters = Counters(student_flops=0.1 + 0.2, stage1_tokens=3, compile_seconds=1 / 3)
    assert Counters.from_json(dataclasses.asdict(counters), "it") == counters
    assert known_cost(dataclasses.asdict(counters)) == counters.to_json()


@pytest.mark.parametrize("saved", [{"seconds": 1.0, "train_flops": 2.0, "tokens": 3}, {}])
def test_counters_of_another_version_are_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"step 4 of RUN was saved by another version.*--output_d"):
        Counters.from_json(saved, "The checkpoint of step 4 of RUN")
    assert known_cost(saved) is None
