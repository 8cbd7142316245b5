"""What storing soft labels takes, by hand."""

from collections.abc import Callable

import pytest

from salt_jax.planning.compile import Job
from salt_jax.planning.stored_labels import labels_in_place_of_teacher, labels_that_are_read
from salt_jax.training import flops


def test_bytes_flops_and_hours(make_job: Callable[..., Job]) -> None:
    job = make_job()  # 25 distilling steps of 32 rows of 16 tokens
    stored = labels_in_place_of_teacher(job, 4, 8, 3.0, 2.0)
    assert stored is not None
    assert job.teacher is not None
    bits = (1000 - 1).bit_length()
    assert stored["bytes_per_token"] == {"float16": 4 * bits / 8 + 12, "uint8": 4 * bits / 8 + 8}
    tokens = 25 * 32 * 16
    assert stored["terabytes"]["uint8"] == pytest.approx(
        stored["bytes_per_token"]["uint8"] * tokens / 1e12
    )
    assert stored["read_gigabytes_per_second"]["float16"] == pytest.approx(
        stored["bytes_per_token"]["float16"] * 32 * 16 / 2.0 / 1e9
    )
    assert stored["flops"] == tokens * flops.forward_flops_per_token(job.teacher, 16)
    assert stored["chip_hours"] == pytest.approx(25 * (3.0 - 2.0) * 8 / 3600)
    assert "FLOPs" not in stored["advice"]


def test_where_nothing_is_known_of_the_device(make_job: Callable[..., Job]) -> None:
    stored = labels_in_place_of_teacher(make_job(), 4, 8, None, None)
    assert stored is not None
    assert stored["chip_hours"] is stored["read_gigabytes_per_second"] is None
    assert "FLOPs, as much as the teacher costs one run" in stored["advice"]


def test_no_teacher_no_labels(make_job: Callable[..., Job]) -> None:
    job = make_job(teacher=None)
    assert labels_in_place_of_teacher(job, 4, 8, None, 2.0) is None
    assert labels_that_are_read(job, 2.0) is None


def test_a_run_from_labels_reads_them(make_job: Callable[..., Job]) -> None:
    job = make_job(teacher=None, soft_labels=4)
    assert labels_in_place_of_teacher(job, 4, 8, 3.0, 2.0) is None
    read = labels_that_are_read(job, 2.0)
    assert read is not None
    bits = (1000 - 1).bit_length()
    assert read["bytes_per_token"]["uint8"] == 4 * bits / 8 + 8
    pace = (4 * bits / 8 + 8) * 32 * 16 / 2.0 / 1e9
    assert read["read_gigabytes_per_second"]["uint8"] == pytest.approx(pace)
    assert f"or {pace:,.3g} GB/s" in read["advice"]
    unknown = labels_that_are_read(job, None)
    assert unknown is not None
    assert "GB/s" not in unknown["advice"]
