"""A stage of a run and a topology in; the compiled program's memory and text out, or what it lacks.

`salt train` runs two programs: stage 1 distils, with the teacher beside the student; stage 2 is
plain. Both are compiled here as there, from shapes and shardings alone.

What a program needs of a device's memory at its peak is the TPU compiler's own account of it, the
one by which it refuses programs. Elsewhere it is an upper bound,

    peak <= arguments + temporaries + outputs - aliased

Arguments are the train state, the batch and the teacher, with what the device's tiles pad; the new
train state is an output that takes the place of the old one (aliased), and so costs nothing. On a
TPU the temporaries of XLA's analysis add up arrays that never live together: the compiler accepts
programs with 22 GiB of them for a chip of 15.75 GiB.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from salt_jax.distill.losses import LossConfig
from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.planning.topologies import GIB, LOCAL, Topology
from salt_jax.training import partitioning
from salt_jax.training.optimizers import Optimizer, make_transformation
from salt_jax.training.train_state import StateLayout, abstract_sharded_params, make_layout
from salt_jax.training.train_step import abstract_batch, lower_step


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run computes in a step; see `salt train` for the settings.

    Attributes:
      model: The student, its vocab_size set.
      teacher: The teacher, its vocab_size set; None where no stage has one.
      teacher_dtype: What the teacher's parameters are held in; the model's own by default.
      optimizer: What updates the student.
      loss: The loss.
      steps: Of the whole run.
      stage1_steps: Of these with the teacher.
      batch_size: Rows of the global batch.
      sequence_length: Tokens of a row.
      microbatches: Parts of a batch, in stage 2.
      stage1_microbatches: The same in stage 1.
      mesh: How the devices are laid out.
      rules: From logical axes to the mesh's.
      teacher_rules: The same for the teacher; None is rules.
      soft_labels: K of the stored soft labels that stand for a teacher; 0 for none.
      extra_features: What batches hold for the run's objectives (train_step.EXTRA_FEATURES). Rows
        stay as long as they are, and so does all else.
    """

    model: DecoderConfig
    teacher: DecoderConfig | None
    teacher_dtype: str | None
    optimizer: Optimizer
    loss: LossConfig
    steps: int
    stage1_steps: int
    batch_size: int
    sequence_length: int
    microbatches: int
    stage1_microbatches: int
    mesh: partitioning.MeshConfig
    rules: partitioning.Rules
    teacher_rules: partitioning.Rules | None = None
    soft_labels: int = 0
    extra_features: tuple[str, ...] = ()

    @property
    def has_stage1(self) -> bool:
        """Whether some steps have a teacher, or soft labels that stand for one."""
        return self.teacher is not None or self.soft_labels > 0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sequence_length

    def labels_of(self, stage: int) -> int:
        """K of the soft labels that a stage's batches hold, 0 for none."""
        return self.soft_labels if stage == 1 else 0

    def microbatches_of(self, stage: int) -> int:
        """Parts of a batch in a stage, 1 or 2."""
        return self.stage1_microbatches if stage == 1 else self.microbatches


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      arguments: Train state, batch and teacher, as they lie in memory.
      temporaries: What lives within the step; on a TPU not all of it at once.
      outputs: What the step gives back.
      aliased: Outputs that lie where arguments lay.
      program: The program itself, which is not part of the peak.
      compiler_peak: The most that is in use at once by the compiler's account; None where it has
        none (XLA for CPUs leaves the temporaries out of it).
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    program: int
    compiler_peak: int | None = None

    @property
    def bound(self) -> int:
        """Arguments + temporaries + outputs - aliased."""
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def peak(self) -> int:
        """The compiler's own, or the bound."""
        return self.bound if self.compiler_peak is None else self.compiler_peak


@dataclasses.dataclass(frozen=True)
class CompiledStage:
    """A stage that compiled.

    Attributes:
      memory: What it needs of a device.
      parts: Bytes of what the peak is made of, by name; see `_parts`.
      hlo: The program's text.
      seconds: How long lowering and compiling took.
    """

    memory: Memory
    parts: Mapping[str, float]
    hlo: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A stage whose program the compiler refused for want of memory.

    Attributes:
      needed_gib: What it would need, as far as the compiler says: often without what comes later.
      seconds: How long it took to find out.
    """

    needed_gib: float | None
    seconds: float


def compile_stage(job: Job, topology: Topology, stage: int) -> CompiledStage | TooLarge:
    """Compiles a stage's step for a topology.

    Args:
      job: What the run computes.
      topology: For which devices.
      stage: 1, with the teacher, or 2.

    Raises:
      InputError: The mesh or the batch does not fit the devices.
    """
    check_batch(job, topology, stage)
    layout, teacher_params = _lay_out(job, topology, stage)
    start = time.perf_counter()
    try:
        compiled = lower_step(
            layout,
            job.loss,
            (job.batch_size, job.sequence_length),
            job.microbatches_of(stage),
            job.teacher if stage == 1 else None,
            teacher_params,
            job.extra_features,
            job.labels_of(stage),
        ).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(needed_gib(str(error)), time.perf_counter() - start)
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise InputError(f"XLA gives no memory analysis for {topology.chip.kind}: plan for a TPU.")
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
        compiler_peak=(analysis.peak_memory_in_bytes or None)
        if topology.devices[0].platform == "tpu"
        else None,
    )
    parts = _parts(job, stage, memory, layout, teacher_params)
    return CompiledStage(memory, parts, compiled.as_text() or "", time.perf_counter() - start)


def check_batch(job: Job, topology: Topology, stage: int) -> None:
    """Raises InputError unless a stage's batch can be split over a topology's devices."""
    mesh = job.mesh.make(topology.devices)
    if topology.name != LOCAL and mesh.shape["slice"] != topology.slices:
        raise InputError(
            f"{topology.name} has {topology.slices} slices and MeshConfig.slice is "
            f"{mesh.shape['slice']}, and that axis is the one over the slow network between "
            f"slices: add --gin.partitioning.MeshConfig.slice={topology.slices}."
        )
    divisor = partitioning.batch_divisor(mesh)
    parts = job.microbatches_of(stage)
    if parts < 1 or job.batch_size % (divisor * parts):
        raise InputError(
            f"batch_size {job.batch_size} can't be split over the {divisor} devices of "
            f"{topology.name} in {parts} microbatches: make it a multiple of devices × "
            "microbatches, or change microbatches (at least 1) or the mesh."
        )


def needed_gib(message: str) -> float | None:
    """What a RESOURCE_EXHAUSTED error says that the program needs, GiB; None if it doesn't say."""
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


def largest_microbatches(job: Job, topology: Topology) -> int:
    """The most parts that a batch can be computed in on these devices."""
    return job.batch_size // partitioning.batch_divisor(job.mesh.make(topology.devices))


def loss_bytes(job: Job, stage: int, mesh: jax.sharding.Mesh) -> float:
    """An estimate of what the loss adds to a device's memory at its peak, bytes.

    For the student its head, gathered in the model's dtype, the head's gradient in float32, and the
    logits of a chunk (LossConfig.chunk_tokens) in float32 with their gradient in the model's dtype;
    for the teacher its head and a chunk's logits. V is a device's part of the vocabulary.
    """
    parts = partitioning.batch_divisor(mesh) * job.microbatches_of(stage)
    chunk = min(job.loss.chunk_tokens, job.tokens // parts)
    share = mesh.shape["tensor"]
    itemsize = jax.numpy.dtype(job.model.dtype).itemsize
    vocabulary = job.model.padded_vocab_size / share
    total = vocabulary * (job.model.embed_dim * (itemsize + 4) + chunk * (4 + itemsize))
    if stage == 1 and job.teacher is not None:
        vocabulary = job.teacher.padded_vocab_size / share
        itemsize = jax.numpy.dtype(job.teacher.dtype).itemsize
        total += vocabulary * (job.teacher.embed_dim * itemsize + chunk * 4)
    return total


def _lay_out(job: Job, topology: Topology, stage: int) -> tuple[StateLayout, Any]:
    mesh = job.mesh.make(topology.devices)
    optimizer = make_transformation(job.optimizer, job.steps, job.model)
    layout = make_layout(job.model, optimizer, mesh, job.rules)
    if stage != 1 or job.teacher is None:
        return layout, None
    rules = job.teacher_rules or job.rules
    return layout, abstract_sharded_params(job.teacher, mesh, rules, job.teacher_dtype)


def _parts(
    job: Job, stage: int, memory: Memory, layout: StateLayout, teacher_params: Any
) -> dict[str, float]:
    """What the peak is made of, bytes.

    The first four are sums over the arrays' shards, `padding` what the arguments take beyond them;
    `loss` is an estimate (`loss_bytes`), and `activations` all other temporaries: what the backward
    pass needs, gradients, gathered parameters.
    """
    shape = job.batch_size, job.sequence_length
    batch = abstract_batch(shape, layout, job.extra_features, job.labels_of(stage))
    parts: dict[str, float] = {
        "student": shard_bytes(layout.abstract.params),
        "optimizer": shard_bytes(layout.abstract.opt_state),
        "teacher": shard_bytes(teacher_params),
        "batch": shard_bytes(batch),
    }
    parts["padding"] = max(0.0, memory.arguments - sum(parts.values()))
    parts["outputs"] = memory.outputs - memory.aliased
    temporaries = max(0.0, memory.peak - sum(parts.values()))
    parts["loss"] = min(temporaries, loss_bytes(job, stage, layout.mesh))
    parts["activations"] = temporaries - parts["loss"]
    return parts


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs that have their shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += leaf.dtype.itemsize * math.prod(shape)
    return total


def in_gib(parts: Mapping[str, float]) -> dict[str, float]:
    """Bytes to GiB."""
    return {name: value / GIB for name, value in parts.items()}
