"""The training step: the two programs that XLA compiles, one with a teacher and one without.

Both are compiled before the first step and the host picks one for each step; `plain` contains
nothing of the teacher.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from salt_jax.distill import chunked_loss, losses
from salt_jax.distill.alignment import Alignment, cosine_sum
from salt_jax.distill.head_sharding import HeadSharding
from salt_jax.models import decoder
from salt_jax.training import compilation, partitioning
from salt_jax.training.train_state import StateLayout, TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[..., tuple[TrainState, Metrics]]

# The features of a batch by name: dtype and rank, of [B], [B, L] or [B, L, K].
BATCH_FEATURES: Mapping[str, tuple[Any, int]] = {
    "inputs": (jnp.int32, 2),
    "targets": (jnp.int32, 2),
    "loss_weights": (jnp.float32, 2),
    "segment_ids": (jnp.int32, 2),
    "positions": (jnp.int32, 2),
}

# Features that only some objectives need: each row's share of ω (by default 1), and which tokens
# attend to each other in both directions (by default none).
EXTRA_FEATURES: Mapping[str, tuple[Any, int]] = {
    "distill": (jnp.float32, 1),
    "bidirectional": (jnp.bool_, 2),
}

# Features of a distilling batch with stored soft labels instead of a teacher.
LABEL_FEATURES: Mapping[str, tuple[Any, int]] = {
    "soft_ids": (jnp.int32, 3),
    "soft_log_q": (jnp.float16, 3),
    "soft_rest": (jnp.float16, 2),
    "soft_teacher_loss": (jnp.float16, 2),
}


class Programs(NamedTuple):
    """The compiled steps, which donate the state that they are given.

    Attributes:
      plain: (state, batch) → (state, metrics).
      distill: (state, batch, teacher parameters, ω, λ) → (state, metrics); None without a teacher.
        With stored soft labels the parameters are None, and the batch has LABEL_FEATURES.
    """

    plain: Step
    distill: Step | None


def compile_programs(
    layout: StateLayout,
    loss_config: losses.LossConfig,
    batch_shape: tuple[int, int],
    *,
    microbatches: int = 1,
    stage1_microbatches: int | None = None,
    teacher_config: decoder.DecoderConfig | None = None,
    teacher_params: Any = None,
    extra_features: Sequence[str] = (),
    soft_labels: int = 0,
    alignment: Alignment | None = None,
    soft_term: bool = True,
    slice_gradient_dtype: str | None = None,
    compiler_options: compilation.Options = (),
) -> Programs:
    """Compiles both steps; see `lower_step` for the arguments.

    `stage1_microbatches`, those of the distilling step, are by default the plain step's.
    """
    settings, options = (loss_config, batch_shape), dict(compiler_options)
    plain = lower_step(
        layout.of_stage2,
        *settings,
        microbatches,
        extra_features=extra_features,
        slice_gradient_dtype=slice_gradient_dtype,
    )
    if teacher_config is None and not soft_labels:
        return Programs(plain.compile(options), None)
    distill = lower_step(
        layout,
        *settings,
        stage1_microbatches or microbatches,
        teacher_config,
        teacher_params,
        extra_features,
        soft_labels,
        alignment,
        soft_term,
        slice_gradient_dtype,
    )
    return Programs(plain.compile(options), distill.compile(options))


def lower_step(
    layout: StateLayout,
    loss_config: losses.LossConfig,
    batch_shape: tuple[int, int],
    microbatches: int,
    teacher_config: decoder.DecoderConfig | None = None,
    teacher_params: Any = None,
    extra_features: Sequence[str] = (),
    soft_labels: int = 0,
    alignment: Alignment | None = None,
    soft_term: bool = True,
    slice_gradient_dtype: str | None = None,
) -> jax.stages.Lowered:
    """Traces one step for the layout's mesh, without compiling it; see Programs.

    Args:
      layout: The student's state.
      loss_config: The loss.
      batch_shape: Rows and tokens of the global batch, [B, L].
      microbatches: Parts of the batch computed one after the other.
      teacher_config: The teacher's model for the distilling step, None for the plain one.
      teacher_params: Its parameters, or ShapeDtypeStructs with shardings.
      extra_features: Which of EXTRA_FEATURES batches have.
      soft_labels: K of the soft labels that replace the teacher in the distilling step, 0 for none.
      alignment: The term of LET in the distilling step, weighted by λ; None for none.
      soft_term: Whether the distilling step has a soft term, weighted by ω.
      slice_gradient_dtype: Dtype in which slices add up their gradients; None for their own.
    """
    replicated = partitioning.replicated(layout.mesh)
    models = teacher_config, alignment, soft_term, slice_gradient_dtype
    step = jax.jit(
        make_step(layout, loss_config, microbatches, *models),
        donate_argnums=0,
        out_shardings=(layout.shardings, replicated),
    )
    batch = abstract_batch(batch_shape, layout, extra_features, soft_labels)
    with partitioning.partitioned(layout.mesh, layout.rules):
        if teacher_config is None and not soft_labels:
            return step.lower(layout.abstract, batch)
        weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
        weights = (weight, weight) if alignment else (weight,)
        return step.lower(layout.abstract, batch, teacher_params, *weights)


def abstract_batch(
    shape: tuple[int, int],
    layout: StateLayout,
    extra_features: Sequence[str] = (),
    soft_labels: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that the programs take, of `shape` [B, L], with K soft labels if not 0."""
    sharding = partitioning.batch_sharding(layout.mesh)
    features = {**BATCH_FEATURES, **{name: EXTRA_FEATURES[name] for name in extra_features}}
    if soft_labels:
        features |= LABEL_FEATURES
    sizes = (*shape, soft_labels)
    return {
        name: jax.ShapeDtypeStruct(sizes[:rank], dtype, sharding=sharding)
        for name, (dtype, rank) in features.items()
    }


def make_step(
    layout: StateLayout,
    loss_config: losses.LossConfig,
    microbatches: int,
    teacher_config: decoder.DecoderConfig | None = None,
    alignment: Alignment | None = None,
    soft_term: bool = True,
    slice_gradient_dtype: str | None = None,
) -> Step:
    """The step, not jitted; see Programs for its arguments."""
    within: tuple[Mesh | AbstractMesh, partitioning.Rules] = layout.mesh, layout.rules
    axes = layout.mesh.shape
    apart = partitioning.slices_compute_apart(axes["tensor"], layout.rules)
    # With one microbatch XLA exchanges gradients once by itself.
    often = microbatches > 1 or slice_gradient_dtype is not None
    if over_slices := axes["slice"] > 1 and apart and often:
        within = partitioning.within_slice(layout.mesh, layout.rules)
    models = layout.config, partitioning.head_sharding(*within), loss_config, teacher_config
    loss_sums = _loss_sums(*models, alignment, soft_term)
    gradients_of = jax.value_and_grad(loss_sums, has_aux=True)

    def accumulated(trained: Any, batch: Batch, frozen: Any) -> tuple[Metrics, Any]:
        def sums_of(part: Batch) -> tuple[Metrics, Any]:
            (_, sums), gradients = gradients_of(trained, part, *frozen)
            return sums, gradients

        def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, sums_of(part)), None

        parts = _split(batch, microbatches)
        first = jax.tree.map(lambda x: x[0], parts)
        if microbatches == 1:
            return sums_of(first)
        shapes = jax.eval_shape(sums_of, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(accumulate, zeros, parts)
        return total

    if over_slices:
        accumulated = _summed_over_slices(accumulated, layout, within[1], slice_gradient_dtype)

    def step(
        state: TrainState, batch: Batch, teacher_params: Any = None, *weights: jax.Array
    ) -> tuple[TrainState, Metrics]:
        trained = state.params, state.projection.kernel if state.projection else None
        sums, gradients = accumulated(trained, batch, (teacher_params, *weights))
        # Weights are divided out once, after microbatches and devices are combined.
        weight = jnp.maximum(sums.pop("weight"), 1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        metrics = _means(sums, weight)
        new_state, update_metrics = _update(layout, state, gradients, metrics["loss"])
        return new_state, {**metrics, "weight": weight, **update_metrics}

    return step


def _summed_over_slices(
    accumulated: Callable[..., tuple[Metrics, Any]],
    layout: StateLayout,
    rules: partitioning.Rules,
    dtype: str | None,
) -> Callable[..., tuple[Metrics, Any]]:
    """Runs `accumulated` on each slice's own rows and adds up the results, in one exchange."""
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, layout.abstract.params), PartitionSpec()

    @functools.partial(jax.shard_map, in_specs=(specs,), out_specs=specs, check_vma=False)
    def exchanged(gradients: Any) -> Any:
        """Adds up each device's part of the gradients."""

        def one(gradient: jax.Array) -> jax.Array:
            sent = gradient.astype(dtype or gradient.dtype)
            return jax.lax.psum(sent, "slice").astype(gradient.dtype)

        return jax.tree.map(one, gradients)

    def of_slice(trained: Any, batch: Batch, frozen: Any) -> tuple[Metrics, Any]:
        with nn.logical_axis_rules(rules):
            sums, gradients = accumulated(trained, batch, frozen)
        return jax.lax.psum(sums, "slice"), exchanged(gradients)

    whole, rows = PartitionSpec(), PartitionSpec("slice")
    return jax.shard_map(
        of_slice,
        in_specs=(whole, rows, whole),
        out_specs=whole,
        axis_names={"slice"},
        check_vma=False,
    )


def _loss_sums(
    config: decoder.DecoderConfig,
    sharding: HeadSharding | None,
    loss_config: losses.LossConfig,
    teacher_config: decoder.DecoderConfig | None,
    alignment: Alignment | None,
    soft_term: bool,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """A function ((params, projection), batch, teacher_params, ω, λ) → (loss sum, sums by name)."""
    assert config.vocab_size is not None, "a model has its vocabulary before it is compiled"
    vocab_size = config.vocab_size

    def sums(
        trained: tuple[Any, jax.Array | None],
        batch: Batch,
        teacher_params: Any,
        omega: jax.Array | float = 0.0,
        align: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, Metrics]:
        (params, kernel_DxE), early_BxLxD = trained, None
        teacher: dict[str, Any] = {}
        if teacher_config is not None:
            frozen = jax.lax.stop_gradient(teacher_params)
            taught_BxLxE = decoder.hidden_states(teacher_config, frozen, batch)
        if teacher_config is not None and soft_term:
            teacher = {
                "teacher_hidden_BxLxD": taught_BxLxE,
                "teacher_head_VxD": decoder.head_kernel(frozen, teacher_config),
                "teacher_vocab_size": teacher_config.vocab_size,
                "teacher_soft_cap": teacher_config.logits_soft_cap,
                "distill_B": batch.get("distill"),
            }
        elif "soft_ids" in batch:
            labels = losses.SoftLabels(*(batch[name] for name in LABEL_FEATURES))
            teacher = {"soft_labels": labels}
        if alignment is None:
            hidden_BxLxD = decoder.hidden_states(config, params, batch)
        else:
            states = decoder.early_and_last_states(config, params, batch, alignment.layer)
            early_BxLxD, hidden_BxLxD = states
        loss, weight, metrics = chunked_loss.loss_sums(
            hidden_BxLxD,
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            jnp.asarray(omega, jnp.float32),
            loss_config,
            vocab_size,
            sharding=sharding,
            soft_cap=config.logits_soft_cap,
            **teacher,
        )
        if early_BxLxD is not None:
            weights_BxL = batch["loss_weights"]
            if "distill" in batch:
                weights_BxL *= batch["distill"][:, None]
                metrics["distilled"] = jnp.sum(weights_BxL)
            assert teacher_config is not None, "an alignment has a teacher"
            taught_BxLxE = taught_BxLxE[..., : teacher_config.embed_dim]
            cosine = cosine_sum(early_BxLxD, taught_BxLxE, weights_BxL, kernel_DxE)
            loss, metrics["cosine"] = loss - align * cosine, cosine
        return loss, {"loss": loss, "weight": weight, **metrics}

    return sums


def _means(sums: Metrics, weight: jax.Array) -> Metrics:
    """Divides each sum by its weight; the teacher's metrics by the weight of the rows it taught."""
    taught = sums.get("distilled", weight)
    taught = jnp.where(taught > 0, taught, 1.0)
    return {
        name: value / (taught if name in losses.TEACHER_VALUES else weight)
        for name, value in sums.items()
    }


def _split(batch: Batch, microbatches: int) -> Batch:
    """[B, …] → [M, B / M, …], each device's rows spread evenly over the microbatches."""

    def one(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // microbatches
        return jnp.swapaxes(x.reshape(rows, microbatches, *x.shape[1:]), 0, 1)

    return {name: one(array) for name, array in batch.items()}


def _update(
    layout: StateLayout, state: TrainState, gradients: Any, loss: jax.Array
) -> tuple[TrainState, Metrics]:
    """Applies the update if it is finite; otherwise parameters and optimizer stay as they are."""
    gradients, d_kernel_DxE = gradients
    gradient_norm = optax.global_norm(gradients)
    updates, opt_state = layout.optimizer.update(gradients, state.opt_state, state.params)
    update_norm = optax.global_norm(updates)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
    projection = state.projection
    if layout.projection is not None and projection is not None:
        finite &= jnp.all(jnp.isfinite(d_kernel_DxE))
        projection = layout.projection.update(projection, d_kernel_DxE)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        skipped_updates=state.skipped_updates + jnp.where(finite, 0, 1),
        projection=jax.tree.map(keep, projection, state.projection),
    )
    return new_state, {
        "grad_norm": gradient_norm,
        "update_norm": update_norm,
        "skipped_updates": new_state.skipped_updates,
    }
