"""What storing soft labels takes, by hand."""

from collections.abc import Callable

import pytest

from salt_jax.planning.compile import Job
from salt_jax.planning.stored_labels import label_sizes, read_sentence, sentence, stored_labels
from salt_jax.training import flops


def test_bytes_flops_and_hours(make_job: Callable[..., Job]) -> None:
    job = make_job()  # 25 distilling steps of 32 rows of 16 tokens
    stored = stored_labels(job, 4, 8, 3.0, 2.0, ("float16", "uint8"))
    assert stored is not None
    assert job.teacher is not None
    bits = (job.model.vocab_size - 1).bit_length()
    assert stored.bytes_per_token == {"float16": 4 * bits / 8 + 12, "uint8": 4 * bits / 8 + 8}
    tokens = 25 * 32 * 16
    assert stored.terabytes["uint8"] == pytest.approx(
        stored.bytes_per_token["uint8"] * tokens / 1e12
    )
    assert stored.read_gigabytes_per_second is not None
    assert stored.read_gigabytes_per_second["float16"] == pytest.approx(
        stored.bytes_per_token["float16"] * 32 * 16 / 2.0 / 1e9
    )
    assert stored.flops == tokens * flops.forward_flops_per_token(job.teacher, 16)
    assert stored.chip_hours == pytest.approx(25 * (3.0 - 2.0) * 8 / 3600)
    assert "FLOPs" not in sentence(stored)


def test_where_nothing_is_known_of_the_device(make_job: Callable[..., Job]) -> None:
    stored = stored_labels(make_job(), 4, 8, None, None, ("uint8",))
    assert stored is not None
    assert stored.chip_hours is stored.read_gigabytes_per_second is None
    assert "FLOPs, as much as the teacher costs one run" in sentence(stored)


def test_no_teacher_no_labels(make_job: Callable[..., Job]) -> None:
    assert (
        stored_labels(make_job(teacher=None, stage1_steps=0), 4, 8, None, 2.0, ("uint8",)) is None
    )


def test_a_run_from_labels_reads_them(make_job: Callable[..., Job]) -> None:
    job = make_job(teacher=None, soft_labels=4)
    assert stored_labels(job, 4, 8, 3.0, 2.0, ("uint8",)) is None
    sizes = label_sizes(job, 4, 2.0, ("uint8",))
    bits = (job.model.vocab_size - 1).bit_length()
    assert sizes.bytes_per_token == {"uint8": 4 * bits / 8 + 8}
    pace = (4 * bits / 8 + 8) * 32 * 16 / 2.0 / 1e9
    assert sizes.read_gigabytes_per_second == {"uint8": pytest.approx(pace)}
    assert f"read at {pace:,.3g} GB/s" in read_sentence(sizes)
    assert "GB/s" not in read_sentence(label_sizes(job, 4, None, ("uint8",)))
