"""A run's steps from the cost of another: as many as cost the same train FLOPs."""

import bisect
import dataclasses
import pathlib

from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.json_files import read_json_object
from salt_jax.storage.run_folder import SUMMARY_FILE
from salt_jax.terminal import say
from salt_jax.training.config import TrainConfig
from salt_jax.training.ledger import Cost
from salt_jax.training.teacher import teaching_flops_per_token

_TOLERANCE = 0.005


def with_equal_cost(
    config: TrainConfig,
    student: DecoderConfig,
    teacher: DecoderConfig | None,
    sequence_length: int,
    scoring: Cost,
) -> TrainConfig:
    """The config with as many steps as cost what the run `config.flops_of` did, and says so.

    Without flops_of the config stays as it is.

    Train FLOPs are those of the student, its teacher and the scoring, as in `ledger.Counters`.

    Args:
      config: The settings.
      student, teacher: The models; None without a teacher.
      sequence_length: Tokens of a row.
      scoring: The cost of this run's selection and soft labels.

    Raises:
      InputError: That run has not finished, or no number of steps is within half a percent.
    """
    if config.flops_of is None:
        return config
    summary = pathlib.Path(config.flops_of) / SUMMARY_FILE
    found = read_json_object(summary, "name another run") if summary.exists() else {}
    target = found.get("train_flops")
    if not isinstance(target, float) or target <= 0:
        raise InputError(
            f"flops_of is {config.flops_of}, which is not the output folder of a finished `salt "
            "train`: name one, or leave it unset."
        )
    rows = config.data.batch_size
    plain = Cost.of_training(student, rows, sequence_length).flops
    teaching = 0.0
    if teacher is not None:
        per_token = teaching_flops_per_token(config, student, teacher, sequence_length)
        teaching = rows * sequence_length * per_token

    def cost(steps: int) -> float:
        return scoring.flops + steps * plain + config.stage1_steps_of(steps) * teaching

    above = 1 + bisect.bisect_left(range(1, 2 + int(target / plain)), target, key=cost)
    steps = min((above, max(above - 1, 1)), key=lambda steps: abs(cost(steps) - target))
    off = cost(steps) / target - 1
    if abs(off) > _TOLERANCE:
        raise InputError(
            f"flops_of is {config.flops_of}, which cost {target:.4g} train FLOPs, and {steps} "
            f"steps of this run cost {cost(steps):.4g} ({off:+.1%}): leave it unset, or make steps "
            "smaller (--batch_size)."
        )
    say(
        f"[{config.method.arm}] {steps} steps, which cost {cost(steps):.4g} train FLOPs, "
        f"{off:+.2%} of what {config.flops_of} did"
    )
    return dataclasses.replace(config, steps=steps)
