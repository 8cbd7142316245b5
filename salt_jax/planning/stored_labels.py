"""A job with stage 1 in; what its soft labels take on disk, and what each run saves by them, out.

A pass over stage 1's tokens costs what the teacher costs one run. The labels then serve every run
on the same rows with the same teacher and temperature, so from the second run on each saves that
pass, and pays for the bytes: stored once, read at the pace of the steps.
"""

import dataclasses

from salt_jax.data.label_format import LabelFormat
from salt_jax.planning.compile import Job
from salt_jax.training import flops


@dataclasses.dataclass(frozen=True)
class LabelSizes:
    """Soft labels of stage 1, each of its tokens once.

    Attributes:
      k: Ids a token.
      bytes_per_token: On disk, in each encoding.
      terabytes: Of all tokens of stage 1, in each encoding.
      read_gigabytes_per_second: While stage 1 runs from them, in each encoding; None where its pace
        is not known.
    """

    k: int
    bytes_per_token: dict[str, float]
    terabytes: dict[str, float]
    read_gigabytes_per_second: dict[str, float] | None


@dataclasses.dataclass(frozen=True)
class StoredLabels(LabelSizes):
    """What they would take in place of a job's teacher.

    Attributes:
      flops: Model FLOPs of the teacher's pass.
      chip_hours: What that pass costs, and what each further run saves; None where not known.
    """

    flops: float
    chip_hours: float | None


def label_sizes(
    job: Job, k: int, stage1_seconds: float | None, encodings: tuple[str, ...]
) -> LabelSizes:
    """What labels take.

    Args:
      job: What the run computes.
      k: Ids a token.
      stage1_seconds: A step's of stage 1 that reads them.
      encodings: Of label_format.ENCODINGS.
    """
    vocab_size = job.model.vocab_size or 0
    forms = {e: LabelFormat(job.sequence_length, vocab_size, k, e) for e in encodings}
    tokens = job.stage1_steps * job.tokens
    per_token = {encoding: form.bytes_per_token for encoding, form in forms.items()}
    pace = None
    if stage1_seconds:
        pace = {e: size * job.tokens / stage1_seconds / 1e9 for e, size in per_token.items()}
    terabytes = {encoding: size * tokens / 1e12 for encoding, size in per_token.items()}
    return LabelSizes(k, per_token, terabytes, pace)


def stored_labels(
    job: Job,
    k: int,
    chips: int,
    stage1_seconds: float | None,
    stage2_seconds: float | None,
    encodings: tuple[str, ...],
) -> StoredLabels | None:
    """What storing takes; None for a run without a teacher.

    Args:
      job: What the run computes.
      k: Ids a token.
      chips: How many devices.
      stage1_seconds: A distilling step's.
      stage2_seconds: A plain step's: what stage 1's take with stored labels.
      encodings: Of label_format.ENCODINGS.
    """
    if job.teacher is None or not job.stage1_steps:
        return None
    tokens = job.stage1_steps * job.tokens
    hours = None
    if stage1_seconds is not None and stage2_seconds is not None:
        more = stage1_seconds - stage2_seconds
        hours = more * job.stage1_steps * chips / 3600 if more > 0 else None
    return StoredLabels(
        **vars(label_sizes(job, k, stage2_seconds, encodings)),
        flops=tokens * flops.forward_flops_per_token(job.teacher, job.sequence_length),
        chip_hours=hours,
    )


def sentence(stored: StoredLabels) -> str:
    """When storing is cheaper than the teacher in every run."""
    cost = (
        f"{stored.flops:.3g} FLOPs"
        if stored.chip_hours is None
        else f"{stored.chip_hours:,.0f} chip-hours"
    )
    return (
        f"Soft labels of {stored.k} ids for each token of stage 1 once: {_sizes(stored)}. Making "
        f"them costs {cost}, as much as the teacher costs one run, and each further run on the "
        "same rows saves that: for one run storing is never cheaper, for N it is where the storage "
        "costs less than N - 1 times as much. Where the rows of stage 1 aren't a selection, all "
        "rows of the split must be labelled; UL2's objectives cannot have stored labels."
    )


def read_sentence(labels: LabelSizes) -> str:
    """What a run from stored labels reads."""
    each = " or ".join(f"{size:,.4g} ({name})" for name, size in labels.bytes_per_token.items())
    return (
        f"Stage 1 reads soft labels of {labels.k} ids a token: {each} bytes a token, "
        f"{_sizes(labels)}. The pass of the teacher that made them is not in these numbers."
    )


def _sizes(labels: LabelSizes) -> str:
    sizes = " or ".join(f"{size:,.3g} TB ({name})" for name, size in labels.terabytes.items())
    pace = labels.read_gigabytes_per_second
    return sizes + (
        f", read at {' or '.join(f'{x:,.3g}' for x in pace.values())} GB/s" if pace else ""
    )
