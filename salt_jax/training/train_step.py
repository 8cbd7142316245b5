"""One training step: (state, batch) in, (state, metrics) out, with or without a teacher.

The two programs of SALT are made here: `distill`, which runs the teacher, and `plain`, which has no
trace of one. Both are compiled before the first step; the host picks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from salt_jax.distill import chunked_loss, losses
from salt_jax.distill.head_sharding import HeadSharding
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.train_state import StateLayout, TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

BATCH_FEATURES = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "loss_weights": jnp.float32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
}

# What a batch may hold besides: of rows, how much of ω counts (1 where it is missing), and of
# tokens, what sees itself in both directions (nothing where it is missing).
EXTRA_FEATURES = {"distill": (jnp.float32, 1), "bidirectional": (jnp.bool_, 2)}

# What a distilling batch holds where soft labels stand for a teacher: [B, L, K] and [B, L].
LABEL_FEATURES = {
    "soft_ids": (jnp.int32, 3),
    "soft_log_q": (jnp.float16, 3),
    "soft_rest": (jnp.float16, 2),
    "soft_teacher_loss": (jnp.float16, 2),
}


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled steps.

    Attributes:
      plain: (state, batch) → (state, metrics).
      distill: (state, batch, teacher parameters, ω) → (state, metrics); None without a teacher.
        With stored soft labels the parameters are None, and the batch has LABEL_FEATURES.
      Both consume the state they are given.
    """

    plain: Callable[..., tuple[TrainState, Metrics]]
    distill: Callable[..., tuple[TrainState, Metrics]] | None


def compile_programs(
    layout: StateLayout,
    loss_config: losses.LossConfig,
    batch_shape: tuple[int, int],
    *,
    microbatches: int = 1,
    teacher_config: decoder.DecoderConfig | None = None,
    teacher_params: Any = None,
    distill_microbatches: int | None = None,
    extra_features: Sequence[str] = (),
    soft_labels: int = 0,
) -> Programs:
    """Compiles both steps.

    Args:
      layout: The student's state.
      loss_config: The loss.
      batch_shape: Rows and tokens of the global batch, [B, L].
      microbatches: Parts of the batch that the plain step computes one after the other.
      teacher_config: The teacher's model, if there is one.
      teacher_params: Its parameters, or ShapeDtypeStructs that have their shardings.
      distill_microbatches: Like microbatches, for the distilling step; the same by default.
      extra_features: Which of EXTRA_FEATURES batches have.
      soft_labels: K of the stored soft labels that stand for a teacher; 0 for none.
    """
    plain = lower_step(
        layout, loss_config, batch_shape, microbatches, extra_features=extra_features
    )
    if teacher_config is None and not soft_labels:
        return Programs(plain.compile(), None)
    distill = lower_step(
        layout,
        loss_config,
        batch_shape,
        distill_microbatches or microbatches,
        teacher_config,
        teacher_params,
        extra_features,
        soft_labels,
    )
    return Programs(plain.compile(), distill.compile())


def lower_step(
    layout: StateLayout,
    loss_config: losses.LossConfig,
    batch_shape: tuple[int, int],
    microbatches: int,
    teacher_config: decoder.DecoderConfig | None = None,
    teacher_params: Any = None,
    extra_features: Sequence[str] = (),
    soft_labels: int = 0,
) -> jax.stages.Lowered:
    """One step, traced for the layout's mesh and still to be compiled; see Programs.

    Args:
      layout: The student's state.
      loss_config: The loss.
      batch_shape: Rows and tokens of the global batch, [B, L].
      microbatches: Parts of the batch computed one after the other.
      teacher_config: The teacher's model for the distilling step, None for the plain one.
      teacher_params: Its parameters, or ShapeDtypeStructs that have their shardings.
      extra_features: Which of EXTRA_FEATURES batches have.
      soft_labels: K of the soft labels of the distilling step, where they stand for a teacher.
    """
    step = jax.jit(
        make_step(layout, loss_config, microbatches, teacher_config),
        donate_argnums=0,
        out_shardings=(layout.shardings, partitioning.replicated(layout.mesh)),
    )
    batch = abstract_batch(batch_shape, layout, extra_features, soft_labels)
    with partitioning.partitioned(layout.mesh, layout.rules):
        if teacher_config is None and not soft_labels:
            return step.lower(layout.abstract, batch)
        omega = jax.ShapeDtypeStruct((), jnp.float32, sharding=partitioning.replicated(layout.mesh))
        return step.lower(layout.abstract, batch, teacher_params, omega)


def abstract_batch(
    shape: tuple[int, int],
    layout: StateLayout,
    extra_features: Sequence[str] = (),
    soft_labels: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the programs take as a batch of `shape` [B, L], with K soft labels if not 0."""
    sharding = partitioning.batch_sharding(layout.mesh)
    dtypes = {name: (dtype, 2) for name, dtype in BATCH_FEATURES.items()}
    dtypes |= {name: EXTRA_FEATURES[name] for name in extra_features}
    if soft_labels:
        dtypes |= LABEL_FEATURES
    sizes = (*shape, soft_labels)
    return {
        name: jax.ShapeDtypeStruct(sizes[:rank], dtype, sharding=sharding)
        for name, (dtype, rank) in dtypes.items()
    }


def make_step(
    layout: StateLayout,
    loss_config: losses.LossConfig,
    microbatches: int,
    teacher_config: decoder.DecoderConfig | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as a function still to be compiled; see Programs for its arguments."""
    sharding = partitioning.head_sharding(layout.mesh, layout.rules)
    sums = _loss_sums(layout.config, loss_config, teacher_config, sharding)
    gradients_of = jax.value_and_grad(sums, has_aux=True)

    def step(
        state: TrainState, batch: Batch, teacher_params: Any = None, omega: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
            (_, metrics), gradients = gradients_of(state.params, part, teacher_params, omega)
            return jax.tree.map(jnp.add, total, (metrics, gradients)), None

        parts = _split(batch, microbatches)
        first = jax.tree.map(lambda x: x[0], parts)
        if microbatches == 1:
            (_, metrics), gradients = gradients_of(state.params, first, teacher_params, omega)
        else:
            shapes = jax.eval_shape(gradients_of, state.params, first, teacher_params, omega)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
            (metrics, gradients), _ = jax.lax.scan(accumulate, zeros, parts)
        # Weights are divided out once, after microbatches and devices are combined.
        weight = jnp.maximum(metrics.pop("weight"), 1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        metrics = _means(metrics, weight)
        new_state, update_metrics = _update(layout.optimizer, state, gradients, metrics["loss"])
        return new_state, {**metrics, "weight": weight, **update_metrics}

    return step


def _loss_sums(
    config: decoder.DecoderConfig,
    loss_config: losses.LossConfig,
    teacher_config: decoder.DecoderConfig | None,
    sharding: HeadSharding | None,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """A function (params, batch, teacher_params, ω) → (loss sum, every sum by name)."""
    if config.vocab_size is None:
        raise AssertionError("the model's vocabulary is set before its programs are made")
    vocab_size = config.vocab_size

    def sums(
        params: Any, batch: Batch, teacher_params: Any, omega: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        teacher_hidden_BxLxD = teacher_head_VxD = None
        if teacher_config is not None:
            frozen = jax.lax.stop_gradient(teacher_params)
            teacher_hidden_BxLxD = decoder.hidden_states(teacher_config, frozen, batch)
            teacher_head_VxD = decoder.head_kernel(frozen, teacher_config)
        loss, weight, metrics = chunked_loss.loss_sums(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            omega if omega is not None else jnp.float32(0.0),
            loss_config,
            vocab_size,
            teacher_hidden_BxLxD=teacher_hidden_BxLxD,
            teacher_head_VxD=teacher_head_VxD,
            teacher_vocab_size=teacher_config.vocab_size if teacher_config is not None else None,
            distill_B=batch.get("distill") if teacher_config is not None else None,
            soft_labels=losses.SoftLabels(*(batch[name] for name in LABEL_FEATURES))
            if "soft_ids" in batch
            else None,
            sharding=sharding,
        )
        return loss, {"loss": loss, "weight": weight, **metrics}

    return sums


def _means(sums: Metrics, weight: jax.Array) -> Metrics:
    """Sums over the weight that each was made with; a teacher's over that of the rows it taught."""
    taught = sums.get("distilled", weight)
    taught = jnp.where(taught > 0, taught, 1.0)
    return {
        name: value / (taught if name in losses.TEACHER_VALUES else weight)
        for name, value in sums.items()
    }


def _split(batch: Batch, microbatches: int) -> Batch:
    """[B, …] → [M, B / M, …]; every device's rows are spread evenly over the microbatches."""

    def one(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // microbatches
        return jnp.swapaxes(x.reshape(rows, microbatches, *x.shape[1:]), 0, 1)

    return {name: one(array) for name, array in batch.items()}


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: Any, loss: jax.Array
) -> tuple[TrainState, Metrics]:
    """Applies a finite update; keeps parameters and optimizer as they are otherwise."""
    gradient_norm = optax.global_norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    update_norm = optax.global_norm(updates)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped_updates=state.skipped_updates + jnp.where(finite, 0, 1),
    )
    return new_state, {
        "grad_norm": gradient_norm,
        "update_norm": update_norm,
        "skipped_updates": new_state.skipped_updates,
    }
