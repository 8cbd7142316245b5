"""Compiles the step of a run's stage for a topology, and measures the device memory that it needs.

`salt train` runs two programs: stage 1 distils, with the teacher beside the student; stage 2 is
plain. They are compiled as in `salt train`, from shapes and shardings alone.

On a TPU the peak is the compiler's own figure, by which it refuses programs. Elsewhere it is an
upper bound:

    peak <= arguments + temporaries + outputs - aliased

Arguments are the train state, the batch and the teacher, padded to the device's tiles. The new
train state is an output in the old one's buffers (aliased), and so costs nothing. On a TPU the
bound is far too high, since XLA's analysis adds up temporaries that are never live together: the
compiler accepts programs with 22 GiB of them for a chip of 15.75 GiB.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning.gpus import cudnn_assumed
from salt_jax.planning.topologies import GIB, Topology
from salt_jax.training import partitioning
from salt_jax.training.compilation import check_options
from salt_jax.training.config import TrainConfig
from salt_jax.training.optimizers import make_transformation
from salt_jax.training.teacher import projection_of
from salt_jax.training.train_state import StateLayout, abstract_sharded_params, make_layout
from salt_jax.training.train_step import abstract_batch, lower_step


@dataclasses.dataclass(frozen=True)
class Job:
    """The run to plan.

    Attributes:
      config: The run's settings, with `model` and its vocab_size set; the cache, the teacher's
        folder and the selection are not used.
      teacher: The teacher, with vocab_size set; None if no stage has one.
      sequence_length: L, tokens of a row.
      soft_labels: K of the stored soft labels that replace a teacher; 0 for none.
      extra_features: Features that batches have for the run's objectives
        (train_step.EXTRA_FEATURES).
    """

    config: TrainConfig
    teacher: DecoderConfig | None
    sequence_length: int
    soft_labels: int = 0
    extra_features: tuple[str, ...] = ()

    @property
    def student(self) -> DecoderConfig:
        """The student."""
        assert self.config.model is not None, "a job is made with a model"
        return self.config.model

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of the run; stage 1 has a teacher or soft labels."""
        return (1, 2) if self.teacher is not None or self.soft_labels else (2,)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.data.batch_size * self.sequence_length

    def labels_of(self, stage: int) -> int:
        """K of the soft labels in a stage's batches, 0 for none."""
        return self.soft_labels if stage == 1 else 0

    def teacher_of(self, stage: int) -> DecoderConfig | None:
        """The teacher of a stage."""
        return self.teacher if stage == 1 else None

    def microbatches_of(self, stage: int) -> int:
        """Microbatches of a step of a stage."""
        return self.config.devices.microbatches_of(stage)

    def mesh(self, topology: Topology) -> jax.sharding.Mesh:
        """The run's mesh over the devices of a topology."""
        return self.config.devices.mesh.make(topology.devices)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: Train state, batch and teacher, with padding.
      temporaries: Arrays within the step; on a TPU not all are live at once.
      outputs: The results of the step.
      aliased: Outputs in the buffers of arguments.
      compiler_peak: The most in use at once by the compiler's own figure; None if it has none (that
        of XLA for CPUs leaves out the temporaries).
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    compiler_peak: int | None = None

    @property
    def bound(self) -> int:
        """Arguments + temporaries + outputs - aliased."""
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def peak(self) -> int:
        """The compiler's own peak, or the bound."""
        return self.bound if self.compiler_peak is None else self.compiler_peak


@dataclasses.dataclass(frozen=True)
class CompiledStage:
    """A stage's compiled program, or what is known of one that the compiler refused as too large.

    Attributes:
      seconds: Time to lower and compile.
      needed_gib: The peak; for a refused program what the compiler says that it needs, a lower
        bound, or None if it doesn't say.
      memory: The memory it needs on a device; None if it was refused.
      parts: The parts of the peak by name, bytes; see `_parts`.
      hlo: The program's text.
    """

    seconds: float
    needed_gib: float | None
    memory: Memory | None = None
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    hlo: str = ""


def compile_stage(job: Job, topology: Topology, stage: int) -> CompiledStage:
    """Compiles the step of stage 1 or 2 for a topology.

    Raises:
      InputError: The mesh, the batch or an option of the compiler does not fit the devices.
    """
    check_batch(job, topology, stage)
    check_options(job.config.devices.compiler_options, topology.devices[0])
    layout, teacher_params = _lay_out(job, topology, stage)
    start = time.perf_counter()
    try:
        with cudnn_assumed(topology.devices):
            lowered = lower_step(
                layout,
                job.config.method.loss_of_steps,
                (job.config.data.batch_size, job.sequence_length),
                job.microbatches_of(stage),
                job.teacher_of(stage),
                teacher_params,
                job.extra_features,
                job.labels_of(stage),
                job.config.method.alignment if stage == 1 else None,
                job.config.has_soft_term,
                job.config.devices.slice_gradient_dtype,
            )
        compiled = lowered.compile(dict(job.config.devices.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return CompiledStage(time.perf_counter() - start, needed_gib(str(error)))
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise InputError(
            f"XLA has no memory analysis for {topology.chip.kind}: choose a TPU's --topology."
        )
    is_tpu, text = topology.devices[0].platform == "tpu", compiled.as_text() or ""
    workspace = _cudnn_workspace(job, stage, layout.mesh) if "__cudnn$fmha" in text else 0
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes + workspace,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        compiler_peak=(analysis.peak_memory_in_bytes or None) if is_tpu else None,
    )
    return CompiledStage(
        seconds=time.perf_counter() - start,
        needed_gib=memory.peak / GIB,
        memory=memory,
        parts=_parts(job, stage, memory, layout, teacher_params),
        hlo=text,
    )


def check_batch(job: Job, topology: Topology, stage: int) -> None:
    """Raises InputError unless a stage's batch can be split over a topology's devices."""
    batch_size, parts = job.config.data.batch_size, job.microbatches_of(stage)
    partitioning.require_split(batch_size, job.mesh(topology), parts, f" of {topology.name}")


def needed_gib(message: str) -> float | None:
    """The GiB that a program needs according to a RESOURCE_EXHAUSTED error; None if not said."""
    unit = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    amount = r"([\d.]+)([KMGT])i?B?"
    for pattern in (
        rf"Total hbm usage >= {amount}",
        rf"Used {amount} of",
        rf"memory required[^(]*\({amount}\)",
        rf"allocate {amount}",
    ):
        if match := re.search(pattern, message):
            return float(match[1]) * unit[match[2]]
    return None


def loss_bytes(job: Job, stage: int, mesh: jax.sharding.Mesh) -> float:
    """Estimated bytes that the loss adds to a device's peak memory.

    For the student: its head, gathered in the model's dtype, the head's gradient in float32, and a
    chunk's logits (LossConfig.chunk_tokens) in float32 with their gradient in the model's dtype.
    For the teacher: its head and a chunk's logits. V is a device's part of the vocabulary.
    """
    parts = partitioning.batch_divisor(mesh) * job.microbatches_of(stage)
    chunk = min(job.config.method.loss.chunk_tokens, job.tokens // parts)

    def of(model: DecoderConfig, gradient: int, logits: int) -> float:
        vocabulary = model.padded_vocab_size / mesh.shape["tensor"]
        itemsize = jax.numpy.dtype(model.dtype).itemsize
        return vocabulary * (model.embed_dim * (itemsize + gradient) + chunk * logits)

    total = of(job.student, 4, 4 + jax.numpy.dtype(job.student.dtype).itemsize)
    teacher = job.teacher_of(stage)
    return total if teacher is None else total + of(teacher, 0, 4)


def _cudnn_workspace(job: Job, stage: int, mesh: jax.sharding.Mesh) -> int:
    """Bytes of the workspace of cuDNN attention's backward pass, which XLA doesn't count.

    About B · H · L · K · 4 for a device's rows and heads.
    """
    parts = partitioning.batch_divisor(mesh) * job.microbatches_of(stage) * mesh.shape["tensor"]
    return 4 * job.tokens * job.student.num_heads * job.student.head_width // parts


def _lay_out(job: Job, topology: Topology, stage: int) -> tuple[StateLayout, Any]:
    mesh, config = job.mesh(topology), job.config
    optimizer = make_transformation(config.optimizer, config.steps, job.student)
    teacher = job.teacher_of(stage)
    projection = projection_of(config, job.student, teacher)
    layout = make_layout(job.student, optimizer, mesh, config.devices.rules, projection)
    if teacher is None:
        return layout, None
    held = config.method.teacher
    rules = held.rules if held and held.rules else config.devices.rules
    dtype = held.dtype if held else None
    return layout, abstract_sharded_params(teacher, mesh, rules, dtype)


def _parts(
    job: Job, stage: int, memory: Memory, layout: StateLayout, teacher_params: Any
) -> dict[str, float]:
    """The parts of the peak, bytes.

    The first four are sums over the arrays' shards, and `padding` is the rest of the arguments.
    `loss` is an estimate (`loss_bytes`), and `activations` are all other temporaries: what the
    backward pass keeps, gradients, gathered parameters.
    """
    shape = job.config.data.batch_size, job.sequence_length
    batch = abstract_batch(shape, layout, job.extra_features, job.labels_of(stage))
    parts: dict[str, float] = {
        "student": _shard_bytes(layout.abstract.params),
        "optimizer": _shard_bytes((layout.abstract.opt_state, layout.abstract.projection)),
        "teacher": _shard_bytes(teacher_params),
        "batch": _shard_bytes(batch),
    }
    parts["padding"] = max(0.0, memory.arguments - sum(parts.values()))
    parts["outputs"] = memory.outputs - memory.aliased
    temporaries = max(0.0, memory.peak - sum(parts.values()))
    parts["loss"] = min(temporaries, loss_bytes(job, stage, layout.mesh))
    parts["activations"] = temporaries - parts["loss"]
    return parts


def _shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )
