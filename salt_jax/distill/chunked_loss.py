"""The losses of `token_losses.py` from hidden states and heads, without [B, L, V] logits.

Each device loops over its tokens in chunks of LossConfig.chunk_tokens: it computes the logits of C
tokens, their losses and, if a gradient is needed, right away the gradients with respect to hidden
states and head, then drops the logits. Nothing is recomputed: a chunk takes three matrix products
for the student and one for the teacher, and the backward pass only scales the gradients. Plain
cross-entropy is the same function without a teacher.

Over a mesh every device keeps its own tokens. The head is gathered once, before the loop; its
gradient is accumulated in float32 and scattered once, after the loop (`head_sharding.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from salt_jax.distill.head_sharding import HeadSharding, VocabularyPart, gathered
from salt_jax.distill.losses import (
    TEACHER_VALUES,
    LossConfig,
    SoftLabels,
    check_vocab_size,
    kept_labels,
)
from salt_jax.distill.token_chunks import chunked, flat_tokens, map_chunks, unchunked
from salt_jax.distill.token_losses import TokenLosses

# About the size of a last-level cache; large enough for matrix products to be efficient.
_HEAD_GRADIENT_BLOCK_BYTES = 16 * 2**20

Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def loss_sums(
    student_hidden_BxLxD: jax.Array,
    student_head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    omega: jax.Array | float,
    config: LossConfig,
    vocab_size: int,
    *,
    teacher_hidden_BxLxD: jax.Array | None = None,
    teacher_head_VxD: jax.Array | None = None,
    distill_B: jax.Array | None = None,
    teacher_vocab_size: int | None = None,
    soft_labels: SoftLabels | None = None,
    sharding: HeadSharding | None = None,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
) -> Sums:
    """Weighted sums over a batch of `losses.token_losses`.

    Only the student's hidden states and head get gradients. Positions of weight 0 are masked out:
    neither their targets nor a NaN in their hidden states affects a sum or a gradient.

    Args:
      student_hidden_BxLxD: Hidden states after the final norm; their dtype is that of the matrix
        products. Logits, losses and the head's gradient are float32 (float64 for float64 inputs).
      student_head_VxD: Any float dtype; its gradient has the same.
      targets_BxL: int32, within [0, vocab_size) where the weight is above 0.
      weights_BxL: float32, 0 or more.
      omega: ω, a traced scalar.
      config: Temperatures, divergence, z-loss, tokens in a chunk.
      vocab_size: Number of ids in use; ids from here on are padding.
      teacher_hidden_BxLxD, teacher_head_VxD: The teacher's, both or neither; D and V may differ.
      teacher_vocab_size: Number of ids that the teacher has, the vocabulary's first ones; None for
        all. It gives the others probability 0.
      distill_B: float32, each row's share of ω; None for 1. Where it is 0 the teacher's hidden
        states are masked out.
      soft_labels: [B, L, …], instead of a teacher, at config's temperature.
      sharding: How the arrays are sharded over a mesh; None on one device.
      soft_cap, teacher_soft_cap: c of each model's logits c · tanh(z / c), or None.

    Returns:
      (sum of weight · loss, sum of weights, {name: sum of weight · value, without gradient}), with
      the names of token_losses except loss. Divide once, after adding up microbatches and devices.
      With distill_B there is also "distilled", the sum of weight · distill_B, which weights the
      teacher's metrics (losses.TEACHER_VALUES): divide those by it.

    Raises:
      InputError: See `losses.check_vocab_size`; more top ids than the soft labels have; a
        vocabulary that the mesh doesn't divide.
    """
    if (teacher_hidden_BxLxD is None) != (teacher_head_VxD is None):
        raise ValueError("The teacher's hidden states and head go together: give both or neither.")
    if soft_labels is not None and (teacher_head_VxD is not None or distill_B is not None):
        raise ValueError("Soft labels replace a teacher, for all rows: give one of the two.")
    teacher_ids = None if teacher_head_VxD is None else teacher_head_VxD.shape[0]
    teacher_vocab_size = teacher_vocab_size or vocab_size
    check_vocab_size(config, vocab_size, student_head_VxD.shape[0], teacher_vocab_size, teacher_ids)
    precise = jnp.promote_types(student_hidden_BxLxD.dtype, jnp.float32)
    teacher: _Teacher | SoftLabels | None = None
    if teacher_hidden_BxLxD is not None and teacher_head_VxD is not None:
        # A device must have the same ids of both heads where the vocabulary is split.
        ids = student_head_VxD.shape[0]
        head_VxD = teacher_head_VxD[:ids].astype(teacher_hidden_BxLxD.dtype)
        head_VxD = jnp.pad(head_VxD, ((0, ids - head_VxD.shape[0]), (0, 0)))
        distill_BxL = None
        if distill_B is not None:
            distill_BxL = jnp.broadcast_to(distill_B.astype(precise)[:, None], targets_BxL.shape)
        teacher = _Teacher(teacher_hidden_BxLxD, head_VxD, distill_BxL)
    elif soft_labels is not None:
        teacher = kept_labels(soft_labels, config, precise)
    batch = targets_BxL, weights_BxL, jnp.asarray(omega, precise), teacher
    caps = soft_cap, teacher_soft_cap
    static = _Static(config, vocab_size, teacher_vocab_size, sharding, caps)
    return _sums(static, student_hidden_BxLxD, student_head_VxD, lax.stop_gradient(batch))


def target_ranks(
    hidden_BxLxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    vocab_size: int,
    *,
    chunk_tokens: int,
    sharding: HeadSharding | None = None,
    soft_cap: float | None = None,
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """How well a model predicts each target, for evaluation and scoring; not differentiable.

    Args:
      hidden_BxLxD, head_VxD, targets_BxL, weights_BxL, vocab_size, sharding, soft_cap: See
        `loss_sums`.
      chunk_tokens: Tokens whose logits a device holds at once.
      entropy: Whether to return the entropy, too, which reads a chunk's logits once more.

    Returns:
      (-log p of the target, nats, float32 [B, L]; number of ids with a strictly greater logit,
      int32 [B, L]; with `entropy` the entropy of p, nats, float32 [B, L]). Undefined where the
      weight is 0. Where the loss is not finite, the number is vocab_size, so that no target counts
      as predicted.
    """

    def one_chunk(
        vocabulary: VocabularyPart, head_VxD: jax.Array, chunk: Any
    ) -> tuple[jax.Array, ...]:
        hidden_CxD, targets_C = chunk
        z_CxV = vocabulary.logits(hidden_CxD, head_VxD)
        truth_C = vocabulary.at(z_CxV, targets_C)
        greater_CxV = (z_CxV > truth_C[:, None]).astype(jnp.float32)
        log_z_C = vocabulary.log_sum_exp(z_CxV)
        loss_C = log_z_C - truth_C
        greater_C = vocabulary.sum(greater_CxV).astype(jnp.int32)  # exact, up to 2²⁴ ids
        greater_C = jnp.where(jnp.isfinite(loss_C), greater_C, vocab_size)
        if not entropy:
            return loss_C.astype(jnp.float32), greater_C
        log_p_CxV = z_CxV - log_z_C[:, None]
        entropy_C = vocabulary.sum(-jnp.exp(log_p_CxV) * log_p_CxV)
        return loss_C.astype(jnp.float32), greater_C, entropy_C.astype(jnp.float32)

    arrays = hidden_BxLxD, head_VxD, targets_BxL, weights_BxL
    return map_chunks(one_chunk, *arrays, vocab_size, chunk_tokens, sharding, soft_cap)


def top_labels(
    hidden_BxLxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    vocab_size: int,
    *,
    k: int,
    temperature: float,
    chunk_tokens: int,
    sharding: HeadSharding | None = None,
    soft_cap: float | None = None,
) -> SoftLabels:
    """A teacher's soft labels; not differentiable.

    Args:
      hidden_BxLxD, head_VxD, targets_BxL, weights_BxL, vocab_size, sharding, soft_cap: See
        `loss_sums`.
      k: K, ids per token.
      temperature: τ.
      chunk_tokens: Tokens whose logits a device holds at once.

    Returns:
      [B, L, …] float32 (float64 for float64 hidden states), ids int32. Undefined where the weight
      is 0.
    """

    def one_chunk(vocabulary: VocabularyPart, head_VxD: jax.Array, chunk: Any) -> SoftLabels:
        hidden_CxD, targets_C = chunk
        t_CxV = vocabulary.logits(hidden_CxD, head_VxD)
        hard_C = vocabulary.log_sum_exp(t_CxV) - vocabulary.at(t_CxV, targets_C)
        cooled_CxV = vocabulary.mask(t_CxV / temperature)
        log_q_CxV = cooled_CxV - vocabulary.log_sum_exp(cooled_CxV)[:, None]
        log_q_CxK, ids_CxK = vocabulary.largest(log_q_CxV, k)
        return SoftLabels(ids_CxK, log_q_CxK, vocabulary.log_rest(log_q_CxV, ids_CxK), hard_C)

    arrays = hidden_BxLxD, head_VxD, targets_BxL, weights_BxL
    return map_chunks(one_chunk, *arrays, vocab_size, chunk_tokens, sharding, soft_cap)


class _Teacher(NamedTuple):
    hidden: jax.Array  # [B, L, E]
    head: jax.Array  # [V, E]
    distill: jax.Array | None  # [B, L], the share of ω


class _Static(NamedTuple):
    """The static arguments, hashable for jax.custom_vjp."""

    config: LossConfig
    vocab_size: int
    teacher_vocab_size: int
    sharding: HeadSharding | None
    soft_caps: tuple[float | None, float | None]  # of the student and the teacher


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: _Static, hidden_BxLxD: jax.Array, head_VxD: jax.Array, batch: Any) -> Sums:
    sums, _ = _sums_and_gradients(static, False, hidden_BxLxD, head_VxD, batch)
    return sums


def _sums_forward(
    static: _Static, hidden_BxLxD: jax.Array, head_VxD: jax.Array, batch: Any
) -> tuple[Sums, Any]:
    sums, gradients = _sums_and_gradients(static, True, hidden_BxLxD, head_VxD, batch)
    # The empty array carries the head's dtype.
    return sums, (*gradients, jnp.zeros(0, head_VxD.dtype))


def _sums_backward(static: _Static, gradients: Any, cotangents: Any) -> tuple[Any, Any, None]:
    del static
    d_hidden_BxLxD, d_head_VxD, like_head = gradients
    scale = cotangents[0]
    d_hidden_BxLxD = (d_hidden_BxLxD * scale).astype(d_hidden_BxLxD.dtype)
    return d_hidden_BxLxD, (d_head_VxD * scale).astype(like_head.dtype), None


_sums.defvjp(_sums_forward, _sums_backward)


def _sums_and_gradients(
    static: _Static, gradients: bool, hidden_BxLxD: jax.Array, head_VxD: jax.Array, batch: Any
) -> tuple[Sums, Any]:
    """The sums and, if needed, the gradients of the loss sum by hidden states and head."""
    head_VxD = head_VxD.astype(hidden_BxLxD.dtype)
    *_, teacher = batch
    has_head = isinstance(teacher, _Teacher)
    shapes = head_VxD.shape, teacher.head.shape if has_head else None
    body = functools.partial(_local_sums, static, gradients, shapes)
    sharding = static.sharding
    if sharding is None:
        return body(hidden_BxLxD, head_VxD, *batch)
    tokens, head, whole = sharding.tokens, sharding.head(head_VxD), PartitionSpec()
    taught: Any = tokens
    if has_head:
        taught = _Teacher(tokens, sharding.head(teacher.head), tokens)  # type: ignore[arg-type]
    return jax.shard_map(
        body,
        mesh=sharding.mesh,
        in_specs=(tokens, head, tokens, tokens, whole, taught),
        out_specs=(whole, (tokens, head) if gradients else None),
        check_vma=False,
    )(hidden_BxLxD, head_VxD, *batch)


def _local_sums(
    static: _Static,
    gradients: bool,
    shapes: Any,
    hidden_BxLxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    omega: jax.Array,
    teacher: _Teacher | SoftLabels | None,
) -> tuple[Sums, Any]:
    """One device's sums: B are its rows, V its part of the ids, `shapes` those of whole heads."""
    precise = jnp.promote_types(hidden_BxLxD.dtype, jnp.float32)
    head_VxD = gathered(static.sharding, head_VxD, shapes[0])
    teacher_head_VxE = None
    if isinstance(teacher, _Teacher):
        teacher_head_VxE = gathered(static.sharding, teacher.head, shapes[1])
    sizes = static.vocab_size, static.teacher_vocab_size
    vocabulary, teachers = (
        VocabularyPart(static.sharding, head_VxD.shape[0], size, soft_cap)
        for size, soft_cap in zip(sizes, static.soft_caps, strict=True)
    )
    counts_BxL = weights_BxL > 0

    def one_chunk(d_head_VxD: Any, chunk: Any) -> tuple[Any, Any]:
        hidden_CxD, targets_C, weights_C, (taught, distill_C) = chunk
        z_CxV = vocabulary.logits(hidden_CxD, head_VxD)
        if teacher_head_VxE is not None:
            taught = teachers.logits(taught, teacher_head_VxE)
        omega_C = omega if distill_C is None else omega * distill_C
        loss = TokenLosses(static.config, omega_C, vocabulary, teachers)
        values, norms = loss.values(z_CxV, taught, targets_C)
        if distill_C is not None:
            values |= {name: distill_C * values[name] for name in TEACHER_VALUES if name in values}
            values["distilled"] = distill_C
        sums = {name: jnp.sum(weights_C * value_C) for name, value_C in values.items()}
        if not gradients:
            return None, (sums, None)
        d_z_CxV = loss.gradient(z_CxV, taught, targets_C, norms)
        d_z_CxV = vocabulary.before_cap(d_z_CxV, z_CxV)
        d_z_CxV = (weights_C[:, None] * d_z_CxV).astype(hidden_CxD.dtype)
        d_hidden_CxD = vocabulary.across(
            jnp.matmul(d_z_CxV, head_VxD, preferred_element_type=precise)
        ).astype(hidden_CxD.dtype)
        return _add_head_gradient(d_head_VxD, d_z_CxV, hidden_CxD), (sums, d_hidden_CxD)

    tokens = (
        flat_tokens(counts_BxL, hidden_BxLxD),
        flat_tokens(counts_BxL, targets_BxL),
        weights_BxL.ravel().astype(precise),
        _taught_tokens(counts_BxL, teacher),
    )
    start: Any = jnp.zeros(head_VxD.shape, precise) if gradients else None
    chunks = chunked(tokens, static.config.chunk_tokens)
    d_head_VxD, (sums, d_hidden) = lax.scan(one_chunk, start, chunks)
    metrics = {name: jnp.sum(per_chunk) for name, per_chunk in sums.items()}
    result = metrics.pop("loss"), jnp.sum(weights_BxL.astype(precise)), metrics
    if static.sharding is not None:
        result = lax.psum(result, static.sharding.batch)
    if not gradients:
        return result, None
    d_hidden_BxLxD = unchunked(d_hidden, targets_BxL.shape)
    if static.sharding is not None:
        d_head_VxD = static.sharding.sum_and_scatter(d_head_VxD, shapes[0])
        # The backward pass waits for the scatter, which frees the whole head's gradient.
        d_hidden_BxLxD, d_head_VxD = lax.optimization_barrier((d_hidden_BxLxD, d_head_VxD))
    return result, (d_hidden_BxLxD, d_head_VxD)


def _add_head_gradient(
    total_VxD: jax.Array, d_z_CxV: jax.Array, hidden_CxD: jax.Array
) -> jax.Array:
    """Adds a chunk's gradient to the head's, a block of ids at a time.

    The whole product would be a second array of the head's size.
    """
    ids = total_VxD.shape[0]
    size = -(-ids // -(-total_VxD.nbytes // _HEAD_GRADIENT_BLOCK_BYTES))

    def add(start: jax.Array | int, size: int, total_VxD: jax.Array) -> jax.Array:
        d_z_CxP = lax.dynamic_slice_in_dim(d_z_CxV, start, size, axis=1)
        part_PxD = lax.dot_general(
            d_z_CxP, hidden_CxD, (((0,), (0,)), ((), ())), preferred_element_type=total_VxD.dtype
        )
        part_PxD += lax.dynamic_slice_in_dim(total_VxD, start, size, axis=0)
        return lax.dynamic_update_slice_in_dim(total_VxD, part_PxD, start, axis=0)

    total_VxD = lax.fori_loop(0, ids // size, lambda i, x: add(i * size, size, x), total_VxD)
    return add(ids - ids % size, ids % size, total_VxD) if ids % size else total_VxD


def _taught_tokens(
    counts_BxL: jax.Array, teacher: _Teacher | SoftLabels | None
) -> tuple[Any, jax.Array | None]:
    """The teacher's hidden state or soft labels of each token, and its share of ω."""
    if teacher is None:
        return None, None
    if isinstance(teacher, SoftLabels):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), teacher), None
    hidden_BxLxE, _, distill_BxL = teacher
    if distill_BxL is None:
        return flat_tokens(counts_BxL, hidden_BxLxE), None
    return flat_tokens(counts_BxL & (distill_BxL > 0), hidden_BxLxE), distill_BxL.ravel()
