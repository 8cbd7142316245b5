"""The settings of a training run: one tree of dataclasses for `salt train` and `salt plan`.

A gin file has a block for each group, so that a variant of a run changes a line:

    config.Method:
      arm = 'salt'
      schedule = @schedules.Step()
      teacher = @config.Teacher()

A flag finds the group that has its field: --cache is Data's, --teacher.step is Teacher's.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from salt_jax.data.denoisers import TEACHER_OBJECTIVES, Objectives
from salt_jax.distill.alignment import Alignment
from salt_jax.distill.losses import LossConfig
from salt_jax.distill.schedules import Adaptive, Schedule, Step
from salt_jax.errors import InputError, require_counts
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training import compilation, partitioning
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.optimizers import Optimizer

TEACHER_DTYPES = ("float32", "bfloat16", "float16")
STAGE2_ROWS = ("all", "unused")

# The gin files that error messages suggest for settings that flags cannot make.
FROM_FILES = {
    "optimizer": "runs/pretrain.gin",
    "learning_rate": "runs/pretrain.gin",
    "arm": "methods/baseline.gin",
    "schedule": "methods/baseline.gin",
    "embed_dim": "models/llm_mini.gin",
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Which rows are trained on, and how many at once.

    Attributes:
      cache: A folder made by `salt prepare`; several are mixed (repeat the flag).
      batch_size: B, rows of the global batch; may change when a run is resumed.
      weights: Each cache's share of the rows read; only proportions matter. By default the caches'
        numbers of rows, so that all end their epochs together.
      selection: A folder made by `salt select`: stage 1 reads only its rows (SALT_DS).
      selection_steps: Steps that read the selection; stage 1's by default. Set it to read selected
        rows without a teacher.
      stage2_rows: "all", or "unused": stage 2 skips the rows of the selection that stage 1 read,
        and reads the others in an order of its own.
      objectives: Training objectives, UL2's mixture for example; None is next-token prediction.
      seed: Seed of the order of rows; arms that are compared should share it.
      read_threads: Threads that read batches ahead.
    """

    cache: str | Sequence[str] | None
    batch_size: int
    weights: Sequence[float] | None = None
    selection: str | None = None
    selection_steps: int | None = None
    stage2_rows: str = "all"
    objectives: Objectives | None = None
    seed: int = 0
    read_threads: int = 2

    def __post_init__(self) -> None:
        require_counts(batch_size=self.batch_size, selection_steps=self.selection_steps)
        require_counts(0, **{"data.seed": self.seed})
        if self.stage2_rows not in STAGE2_ROWS:
            raise InputError(f"stage2_rows is {self.stage2_rows!r}: choose 'all' or 'unused'.")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen model that teaches in stage 1.

    Attributes:
      path: The folder of its run.
      step: Its checkpoint; the newest by default.
      dtype: Dtype of its parameters in memory, such as "bfloat16"; as saved by default.
      objectives: "all" teaches every row; "causal", for a teacher trained on next-token prediction
        alone, sets ω to 0 on denoised rows.
      rules: Logical-axis rules for its parameters; the student's by default. Without gradients and
        optimizer state they may fit whole on each device where the student's don't.
    """

    path: str | None
    step: int | None = None
    dtype: str | None = None
    objectives: str = "all"
    rules: partitioning.Rules | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *TEACHER_DTYPES):
            raise InputError(
                f"The teacher's dtype is {self.dtype!r}, expected one of "
                f"{', '.join(TEACHER_DTYPES)}: change --teacher.dtype."
            )
        if self.objectives not in TEACHER_OBJECTIVES:
            raise InputError(
                f"The teacher's objectives are {self.objectives!r}: set --teacher.objectives to "
                "'all' or 'causal'."
            )


@dataclasses.dataclass(frozen=True)
class Method:
    """How the student learns: an arm of a comparison.

    Attributes:
      arm: Its name in reports ("baseline", "salt").
      schedule: ω by step: which steps have a teacher, and how much it counts.
      loss: Temperatures, divergence, z-loss.
      teacher: The model that teaches in stage 1.
      soft_labels: A folder made by `salt score --soft_labels=K`, used instead of a teacher.
      alignment: LET: an early layer of the student learns the teacher's last hidden states. Stage 1
        lasts until both ω and λ are 0.
    """

    arm: str
    schedule: Schedule
    loss: LossConfig = LossConfig()  # noqa: RUF009 (frozen)
    teacher: Teacher | None = None
    soft_labels: str | None = None
    alignment: Alignment | None = None

    def __post_init__(self) -> None:
        if self.alignment is not None and self.soft_labels is not None:
            raise InputError(
                f"soft_labels is {self.soft_labels} and alignment needs the teacher's hidden "
                "states: leave one unset, or set a teacher instead of soft_labels."
            )
        if self.by_cosine and self.soft_labels is not None:
            raise InputError(
                f"soft_labels is {self.soft_labels}, and the cosine of the gradients needs a "
                "teacher's logits: set Adaptive.signal to 'gap', or a teacher."
            )
        if not self.arm.strip() or not self.arm.isprintable():
            raise InputError(f"arm is {self.arm!r}, expected a name for reports: change --arm.")

    @property
    def by_cosine(self) -> bool:
        """Whether steps give the cosine of the gradients as a metric."""
        asked = isinstance(self.schedule, Adaptive) and self.schedule.signal == "cosine"
        return asked or self.loss.gradient_cosine

    @property
    def loss_of_steps(self) -> LossConfig:
        """The loss with the metrics that the schedule watches."""
        return dataclasses.replace(self.loss, gradient_cosine=self.by_cosine)


@dataclasses.dataclass(frozen=True)
class Initial:
    """A trained model whose parameters training starts from.

    Attributes:
      path: The folder of its run.
      step: Its checkpoint; the newest by default.
      stacked: The student may have more layers, the model's repeated: layer i is its layer i mod m
        of m (arXiv 2405.15319).
    """

    path: str | None
    step: int | None = None
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Devices:
    """How programs are partitioned over the devices.

    Attributes:
      mesh: Devices along each mesh axis.
      rules: Logical-axis rules: from the model's axes to the mesh's.
      microbatches: Parts of a batch computed one after the other, to save memory.
      stage1_microbatches: Microbatches in stage 1, where the teacher needs memory; by default the
        same as microbatches.
      slice_gradient_dtype: "bfloat16" rounds the gradients that slices add up over the network,
        once a step, to half the bytes; by default they keep their dtype. No effect on one slice.
      compiler_options: XLA's options for the training steps, as pairs of name and value.
      compilation_cache: A folder that keeps compiled programs between runs; "" keeps none.
    """

    mesh: partitioning.MeshConfig = partitioning.MeshConfig()  # noqa: RUF009 (frozen)
    rules: partitioning.Rules = partitioning.DEFAULT_RULES
    microbatches: int = 1
    stage1_microbatches: int | None = None
    slice_gradient_dtype: str | None = None
    compiler_options: compilation.Options = ()
    compilation_cache: str = compilation.DEFAULT_FOLDER

    def __post_init__(self) -> None:
        require_counts(microbatches=self.microbatches, stage1_microbatches=self.stage1_microbatches)
        if self.slice_gradient_dtype not in (None, "bfloat16"):
            raise InputError(
                f"slice_gradient_dtype is {self.slice_gradient_dtype!r}: set it to 'bfloat16', or "
                "leave it unset."
            )
        apart = partitioning.slices_compute_apart(self.mesh.tensor, self.rules)
        if self.slice_gradient_dtype and not apart:
            raise InputError(
                f"slice_gradient_dtype is {self.slice_gradient_dtype!r}, which takes "
                "MeshConfig.tensor 1 and rules that split only the batch over slices: leave it "
                "unset."
            )

    def microbatches_of(self, stage: int) -> int:
        """Microbatches of a step of stage 1 or 2."""
        return (self.stage1_microbatches if stage == 1 else None) or self.microbatches


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When a run is evaluated on the validation split.

    Attributes:
      every: Steps between evaluations; the last step is always evaluated.
      rows: Rows to read of each cache's split; all by default.
    """

    every: int = 1000
    rows: int | None = None

    def __post_init__(self) -> None:
        require_counts(1, **{"evaluation.every": self.every, "evaluation.rows": self.rows})


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """What is shown of a run beside its metrics.

    Attributes:
      profile_steps: "100:105" writes a profile of the steps 100 to 105, both included, numbered as
        in metrics.
      price: The price of a chip-hour, in any currency.
      wandb_project: A project of Weights & Biases that metrics are sent to, too.
    """

    profile_steps: str | None = None
    price: float | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        if self.price is not None and not 0 <= self.price < math.inf:
            raise InputError(
                f"price is {self.price}, expected the price of a chip-hour, 0 or more: change "
                "--price."
            )
        if self.profiled is not None and not 1 <= self.profiled[0] <= self.profiled[1]:
            raise self._malformed()

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        if self.profile_steps is None:
            return None
        found = re.fullmatch(r"([0-9]+):([0-9]+)", self.profile_steps)
        if found is None:
            raise self._malformed()
        return int(found[1]), int(found[2])

    def _malformed(self) -> InputError:
        return InputError(
            f"profile_steps is {self.profile_steps!r}, expected the first and the last step to "
            "profile, such as 100:105: change --profile_steps."
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      data: The rows.
      method: The arm: schedule, loss, teacher.
      optimizer: The optimizer and its learning rate.
      steps: Updates of the whole run.
      flops_of: The output folder of a finished run: take as many steps as cost what that one did,
        its teacher and its scoring included. `steps` must be set too, and does not count.
      fork_from: The output folder of a run that differs in n_kd alone: start from its newest
        checkpoint in stage 1 of both (`training/fork.py`).
      model: The student; the initial model's shape by default. An unset vocab_size is the cache's.
      initial: A model to start from.
      devices: The mesh, microbatches and the compilation cache.
      evaluation: When to evaluate.
      checkpoints: When to save, what to keep.
      monitoring: Profile, price, Weights & Biases.
      seed: Seed of the student's initialization.
      log_every: Steps between lines of metrics.
      max_skipped_updates: Non-finite updates to skip before the run fails.
      hang_seconds: A longer wait for rows, a device or a checkpoint prints the stacks of all
        threads; 0 for never.
    """

    data: Data
    method: Method
    optimizer: Optimizer
    steps: int
    model: DecoderConfig | None = None
    initial: Initial | None = None
    devices: Devices = Devices()
    evaluation: Evaluation = Evaluation()
    checkpoints: CheckpointConfig = CheckpointConfig()  # noqa: RUF009 (frozen)
    monitoring: Monitoring = Monitoring()
    seed: int = 0
    log_every: int = 10
    max_skipped_updates: int = 10
    hang_seconds: float = 600.0
    flops_of: str | None = None
    fork_from: str | None = None

    def __post_init__(self) -> None:
        require_counts(steps=self.steps, log_every=self.log_every)
        require_counts(0, max_skipped_updates=self.max_skipped_updates, seed=self.seed)
        if self.hang_seconds < 0:
            raise InputError(
                f"hang_seconds is {self.hang_seconds}, expected seconds, or 0 for never: change "
                "--hang_seconds."
            )
        if self.flops_of is not None and isinstance(self.method.schedule, Adaptive):
            raise InputError(
                f"flops_of is {self.flops_of} and the schedule is Adaptive, whose cost is not "
                "known before it has decided: leave flops_of unset, and compare by the report."
            )
        if self.fork_from is not None and type(self.method.schedule) is not Step:
            raise InputError(
                f"fork_from is {self.fork_from} and the schedule is "
                f"{type(self.method.schedule).__name__}: it needs the schedule Step, which has an "
                "n_kd (--gin_file=methods/salt.gin), or leave fork_from unset."
            )
        if self.fork_from is not None and self.flops_of is not None:
            raise InputError(
                f"fork_from is {self.fork_from} and flops_of is {self.flops_of}, and a fork has "
                "the steps of its trunk: leave one unset."
            )
        selected, adaptive = self.data.selection, isinstance(self.method.schedule, Adaptive)
        if adaptive and selected is not None and self.data.selection_steps is None:
            raise InputError(
                f"selection is {selected} and the schedule is Adaptive, which decides after rows "
                "are read ahead: set selection_steps to the steps that read the selection."
            )
        profiled = self.monitoring.profiled
        if profiled is not None and profiled[1] > self.steps:
            raise InputError(
                f"profile_steps is {self.monitoring.profile_steps} and the run has {self.steps} "
                f"steps: change --profile_steps to steps from 1 to {self.steps}."
            )
        keep_steps = tuple(self.checkpoints.keep_steps)
        if any(not 0 < step <= self.steps for step in keep_steps):
            raise InputError(
                f"CheckpointConfig.keep_steps is {keep_steps} and the run has {self.steps} steps: "
                f"keep steps from 1 to {self.steps} (--gin.KEEP_STEPS), or raise --steps."
            )

    @property
    def stage1_steps(self) -> int:
        """Steps with a teacher; with an adaptive schedule the most."""
        return self.stage1_steps_after(None)

    def stage1_steps_after(self, n_kd: int | None) -> int:
        """Steps with a teacher, once an adaptive schedule has decided on n_kd."""
        return self.stage1_steps_of(self.steps, n_kd)

    def stage1_steps_of(self, steps: int, n_kd: int | None = None) -> int:
        """Steps with a teacher of a run of `steps` steps."""
        alignment = self.method.alignment
        aligned = min(alignment.stop, steps) if alignment else 0
        taught = self.method.schedule.distill_steps(steps)
        return max(taught if n_kd is None else min(taught, n_kd), aligned)

    @property
    def has_soft_term(self) -> bool:
        """Whether any step has ω over 0."""
        return self.method.schedule.distill_steps(self.steps) > 0
