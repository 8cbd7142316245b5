"""What stored soft labels take on disk, and what each run saves by them.

A pass over stage 1's tokens costs as much as the teacher costs one run. The labels then serve every
run on the same rows with the same teacher and temperature: from the second run on each saves that
pass and pays for the bytes, stored once and read at the pace of the steps.
"""

from typing import Any

from salt_jax.data.label_format import ENCODINGS, LabelFormat
from salt_jax.planning.compile import Job
from salt_jax.training import flops


def labels_in_place_of_teacher(
    job: Job, k: int, chips: int, stage1_seconds: float | None, stage2_seconds: float | None
) -> dict[str, Any] | None:
    """What labels of K ids a token would take in place of a job's teacher; None if it has none.

    Args:
      job: What the run computes.
      k: Ids a token.
      chips: The number of devices.
      stage1_seconds: A distilling step's, None if not known.
      stage2_seconds: A plain step's: what stage 1's take with stored labels.

    Returns:
      summary.json's "stored_labels": of each encoding its bytes a token, the terabytes of stage 1's
      tokens once and the gigabytes read a second; the FLOPs and chip-hours of the teacher's pass,
      which each further run saves; and a sentence of advice.
    """
    steps = job.config.stage1_steps
    if job.teacher is None or not steps:
        return None
    hours = None
    if stage1_seconds is not None and stage2_seconds is not None:
        hours = max(0.0, stage1_seconds - stage2_seconds) * steps * chips / 3600 or None
    forward = flops.forward_flops_per_token(job.teacher, job.sequence_length)
    sizes, total = _sizes(job, k, stage2_seconds), steps * job.tokens * forward
    cost = f"{total:.3g} FLOPs" if hours is None else f"{hours:,.0f} chip-hours"
    advice = (
        f"Soft labels of {k} ids for each token of stage 1 once: {_text(sizes)}. Making them costs "
        f"{cost}, as much as the teacher costs one run, and each further run on the same rows "
        "saves that. For one run storing is never cheaper; for N it is where the storage costs "
        "less than N - 1 times as much. Where the rows of stage 1 aren't a selection, all rows of "
        "the split must be labelled; UL2's objectives can't have stored labels."
    )
    return {**sizes, "flops": total, "chip_hours": hours, "advice": advice}


def labels_that_are_read(job: Job, stage1_seconds: float | None) -> dict[str, Any] | None:
    """summary.json's "read_labels", of a run from stored labels; None for any other run.

    Args:
      job: What the run computes.
      stage1_seconds: A step's of stage 1, which reads them; None if not known.
    """
    if not job.soft_labels:
        return None
    sizes = _sizes(job, job.soft_labels, stage1_seconds)
    each = " or ".join(f"{size:,.4g} ({name})" for name, size in sizes["bytes_per_token"].items())
    advice = (
        f"Stage 1 reads soft labels of {job.soft_labels} ids a token: {each} bytes a token, "
        f"{_text(sizes)}. The pass of the teacher that made them is not in these numbers."
    )
    return {**sizes, "advice": advice}


def _sizes(job: Job, k: int, step_seconds: float | None) -> dict[str, Any]:
    """What labels of stage 1's tokens take, by encoding; K ids a token."""
    vocabulary, tokens = job.student.vocab_size or 0, job.config.stage1_steps * job.tokens
    per_token = {
        encoding: LabelFormat(job.sequence_length, vocabulary, k, encoding).bytes_per_token
        for encoding in ENCODINGS
    }
    pace = job.tokens / step_seconds if step_seconds else None
    return {
        "k": k,
        "bytes_per_token": per_token,
        "terabytes": {name: size * tokens / 1e12 for name, size in per_token.items()},
        "read_gigabytes_per_second": pace
        and {name: size * pace / 1e9 for name, size in per_token.items()},
    }


def _text(sizes: dict[str, Any]) -> str:
    text = " or ".join(f"{size:,.3g} TB ({name})" for name, size in sizes["terabytes"].items())
    if pace := sizes["read_gigabytes_per_second"]:
        text += f", read at {' or '.join(f'{x:,.3g}' for x in pace.values())} GB/s"
    return text
