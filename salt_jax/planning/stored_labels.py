"""The disk space of stored soft labels, and what they save.

A pass over stage 1's tokens costs as much as the teacher costs one run. The labels then serve every
run on the same rows with the same teacher and temperature: each run after the first saves that
pass, and pays for bytes that are stored once and read at the pace of the steps.
"""

from typing import Any

from salt_jax.data.label_format import ENCODINGS, LabelFormat
from salt_jax.planning.compile import Job
from salt_jax.training import flops


def labels_in_place_of_teacher(
    job: Job, k: int, chips: int, stage1_seconds: float | None, stage2_seconds: float | None
) -> dict[str, Any] | None:
    """summary.json's "stored_labels": labels that would replace a job's teacher; None without one,
    and with LET, which needs its hidden states.

    Args:
      job: The run.
      k: K, ids per token.
      chips: The number of devices.
      stage1_seconds: Seconds of a distilling step; None if unknown.
      stage2_seconds: Seconds of a plain step, which a step with stored labels takes, too.

    Returns:
      By encoding the bytes per token, the terabytes of stage 1's tokens, and the gigabytes read per
      second; the FLOPs and chip-hours of the teacher's pass, which each further run saves; and a
      sentence of advice.
    """
    steps = job.config.stage1_steps
    if job.teacher is None or not steps or job.config.method.alignment is not None:
        return None
    hours = None
    if stage1_seconds is not None and stage2_seconds is not None:
        hours = max(0.0, stage1_seconds - stage2_seconds) * steps * chips / 3600 or None
    forward = flops.forward_flops_per_token(job.teacher, job.sequence_length)
    sizes, total = _sizes(job, k, stage2_seconds), steps * job.tokens * forward
    cost = f"{total:.3g} FLOPs" if hours is None else f"{hours:,.0f} chip-hours"
    advice = (
        f"Soft labels of {k} ids for each token of stage 1: {_text(sizes)}. Computing them costs "
        f"{cost}, as much as the teacher costs one run, and each further run on the same rows "
        "saves that. For one run storing is never cheaper; for N runs it is if storage costs "
        "less than N - 1 times as much. If the rows of stage 1 aren't a selection, all rows of "
        "the split must be labelled; UL2's objectives can't use stored labels."
    )
    return {**sizes, "flops": total, "chip_hours": hours, "advice": advice}


def labels_that_are_read(job: Job, stage1_seconds: float | None) -> dict[str, Any] | None:
    """summary.json's "read_labels" of a run from stored labels; None for other runs.

    `stage1_seconds` are those of a step of stage 1, which reads the labels; None if unknown.
    """
    if not job.soft_labels:
        return None
    sizes = _sizes(job, job.soft_labels, stage1_seconds)
    each = " or ".join(f"{size:,.4g} ({name})" for name, size in sizes["bytes_per_token"].items())
    advice = (
        f"Stage 1 reads soft labels of {job.soft_labels} ids per token: {each} bytes per token, "
        f"{_text(sizes)}. The teacher's pass that made them is not included in these numbers."
    )
    return {**sizes, "advice": advice}


def _sizes(job: Job, k: int, step_seconds: float | None) -> dict[str, Any]:
    """The sizes of labels of stage 1's tokens, by encoding; K ids per token."""
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
