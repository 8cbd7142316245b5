"""The losses of `losses.py` from hidden states and heads, without [B, L, V] logits of any model.

In: hidden states and head of the student, and of the teacher where there is one. Out: sums over
the batch, and gradients. Each device takes its tokens in chunks of LossConfig.chunk_tokens: C
tokens' logits are made, turned into losses and, where a gradient is wanted, at once into the
gradients of hidden states and head, then dropped. Nothing is computed twice: three matrix products
a chunk for the student, one for the teacher, and the backward pass only scales what is there.

With p = softmax(z / T), q the teacher's softmax and h = p · ∂soft/∂p, by the chain rule

    ∂soft/∂z = (h - p · Σ h) / T
    forward_kl      h = -q
    reverse_kl      h = p (log p - log q)
    jensen_shannon  h = (1 - β) p (log p - log m)

Of teacher_top_k's k + 1 outcomes, h of the rest falls to its ids in proportion to their p. Plain
cross-entropy is the same function without its teacher.

Over a mesh every device keeps its own tokens; the head is gathered once, before the loop, along
all but the vocabulary's axes, and its gradient is added up in float32 and scattered once, after it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from salt_jax.distill.losses import LOG_ZERO, LossConfig, check_vocab_size

# About the size of a last-level cache; large enough for matrix products to be efficient.
_HEAD_GRADIENT_BLOCK_BYTES = 16 * 2**20

Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """How tokens and heads lie over a mesh while the loss is computed.

    Attributes:
        mesh: the mesh.
        batch: its axes that split the batch.
        vocab: its axes that split the vocabulary: each device has its part of every token's logits.
        embed: its axes that split D of the student's head. Where they are among batch and divide D,
            the head's gradient is scattered over them as it is summed.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    def devices(self, axes: tuple[str, ...]) -> int:
        """The number of devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


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
    sharding: HeadSharding | None = None,
) -> Sums:
    """Weighted sums over a batch of `losses.token_losses`.

    Gradients go to the student's hidden states and head, and to nothing else: neither to the
    teacher nor to ω or the weights. A position of weight 0 has no part in anything, whatever stands
    there: neither its target nor a NaN in its hidden states reaches a sum or a gradient.

    Args:
        student_hidden_BxLxD: after the final norm; their dtype is the products'. Logits, losses and
            the head's gradient are float32 (float64 for float64 hidden states).
        student_head_VxD: any float dtype; its gradient has the same.
        targets_BxL: int32, within [0, vocab_size) where the weight is above 0.
        weights_BxL: float32, 0 or more.
        omega: ω, a traced scalar.
        config: temperatures, divergence, z-loss, tokens a chunk.
        vocab_size: number of ids that mean something; those after it are padding.
        teacher_hidden_BxLxD: with teacher_head_VxD, the teacher's; both or neither. Width and V are
            the teacher's own.
        teacher_head_VxD: see teacher_hidden_BxLxD.
        sharding: how the arrays lie over a mesh; None on one device.

    Returns:
        (sum of weight · loss, sum of weights, {name: sum of weight · value, without gradient}) with
        the names of token_losses but loss. Divide once, when microbatches and devices are added.
    """
    if (teacher_hidden_BxLxD is None) != (teacher_head_VxD is None):
        raise ValueError("The teacher's hidden states and head go together: give both or neither.")
    teacher_ids = None if teacher_head_VxD is None else teacher_head_VxD.shape[0]
    check_vocab_size(config, vocab_size, student_head_VxD.shape[0], teacher_ids)
    precise = jnp.promote_types(student_hidden_BxLxD.dtype, jnp.float32)
    teacher = None
    if teacher_hidden_BxLxD is not None and teacher_head_VxD is not None:
        missing = student_head_VxD.shape[0] - teacher_head_VxD.shape[0]
        if missing:  # Both heads must have the same ids where the vocabulary is split.
            padded_VxD = jnp.pad(teacher_head_VxD, ((0, max(missing, 0)), (0, 0)))
            teacher_head_VxD = padded_VxD[: student_head_VxD.shape[0]]
        teacher = teacher_hidden_BxLxD, teacher_head_VxD
    batch = targets_BxL, weights_BxL, jnp.asarray(omega, precise), teacher
    static = _Static(config, vocab_size, sharding)
    frozen = jax.tree.map(lax.stop_gradient, batch)
    return _sums(static, student_hidden_BxLxD, student_head_VxD, frozen)


def target_ranks(
    hidden_BxLxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    vocab_size: int,
    *,
    chunk_tokens: int,
    sharding: HeadSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How well a model predicts each target, for evaluation and scoring; no gradient.

    Args:
        hidden_BxLxD, head_VxD, targets_BxL, weights_BxL, vocab_size, sharding: see `loss_sums`.
        chunk_tokens: tokens that a device handles at once.

    Returns:
        (-log p of the target, nats [B, L] float32; number of ids with a strictly greater logit
        [B, L] int32). Both say nothing where the weight is 0.
    """

    def body(
        hidden_BxLxD: jax.Array, head_VxD: jax.Array, targets_BxL: jax.Array, weights_BxL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        vocabulary = _Vocabulary(sharding, head_VxD.shape[0], vocab_size)

        def one_chunk(_: None, chunk: Any) -> tuple[None, Any]:
            hidden_CxD, targets_C = chunk
            z_CxV = vocabulary.logits(hidden_CxD, head_VxD)
            truth_C = vocabulary.at(z_CxV, targets_C)
            greater_CxV = (z_CxV > truth_C[:, None]).astype(jnp.int32)
            loss_C = vocabulary.log_sum_exp(z_CxV) - truth_C
            return None, (loss_C.astype(jnp.float32), vocabulary.sum(greater_CxV))

        counts_BxL = weights_BxL > 0
        tokens = _tokens(counts_BxL, hidden_BxLxD), jnp.where(counts_BxL, targets_BxL, 0).ravel()
        _, values = lax.scan(one_chunk, None, _chunked(tokens, chunk_tokens))
        loss_BxL, greater_BxL = (_unchunked(x, targets_BxL.shape) for x in values)
        return loss_BxL, greater_BxL

    head_VxD = head_VxD.astype(hidden_BxLxD.dtype)
    if sharding is None:
        return body(hidden_BxLxD, head_VxD, targets_BxL, weights_BxL)
    token, head = _specs(sharding, head_VxD)
    return jax.shard_map(
        body,
        mesh=sharding.mesh,
        in_specs=(token, head, token, token),
        out_specs=token,
        check_vma=False,
    )(hidden_BxLxD, head_VxD, targets_BxL, weights_BxL)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is no array."""

    config: LossConfig
    vocab_size: int
    sharding: HeadSharding | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: _Static, hidden_BxLxD: jax.Array, head_VxD: jax.Array, batch: Any) -> Sums:
    sums, _ = _sums_and_gradients(static, False, hidden_BxLxD, head_VxD, batch)
    return sums


def _sums_forward(
    static: _Static, hidden_BxLxD: jax.Array, head_VxD: jax.Array, batch: Any
) -> tuple[Sums, Any]:
    sums, gradients = _sums_and_gradients(static, True, hidden_BxLxD, head_VxD, batch)
    # An empty array remembers the head's dtype.
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
    """The sums and, if wanted, their first one's gradients by hidden states and head."""
    head_VxD = head_VxD.astype(hidden_BxLxD.dtype)
    targets_BxL, weights_BxL, omega, teacher = batch
    if teacher is not None:
        teacher = teacher[0], teacher[1].astype(teacher[0].dtype)
    body = functools.partial(_local_sums, static, gradients)
    sharding = static.sharding
    if sharding is None:
        return body(hidden_BxLxD, head_VxD, targets_BxL, weights_BxL, omega, teacher)
    token, head = _specs(sharding, head_VxD)
    whole = PartitionSpec()
    head_gradient = PartitionSpec(*head, _scattered(sharding, head_VxD) or None)
    return jax.shard_map(
        body,
        mesh=sharding.mesh,
        in_specs=(token, head, token, token, whole, None if teacher is None else (token, head)),
        out_specs=(whole, (token, head_gradient) if gradients else None),
        check_vma=False,
    )(hidden_BxLxD, head_VxD, targets_BxL, weights_BxL, omega, teacher)


def _local_sums(
    static: _Static,
    gradients: bool,
    hidden_BxLxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    omega: jax.Array,
    teacher: tuple[jax.Array, jax.Array] | None,
) -> tuple[Sums, Any]:
    """What one device does: B its rows, V its part of the vocabulary."""
    precise = jnp.promote_types(hidden_BxLxD.dtype, jnp.float32)
    vocabulary = _Vocabulary(static.sharding, head_VxD.shape[0], static.vocab_size)
    loss = _Loss(static.config, omega, vocabulary)
    counts_BxL = weights_BxL > 0

    def one_chunk(d_head_VxD: Any, chunk: Any) -> tuple[Any, Any]:
        hidden_CxD, targets_C, weights_C, teacher_hidden_CxE = chunk
        z_CxV = vocabulary.logits(hidden_CxD, head_VxD)
        t_CxV = vocabulary.logits(teacher_hidden_CxE, teacher[1]) if teacher is not None else None
        values, norms = loss.values(z_CxV, t_CxV, targets_C)
        sums = {name: jnp.sum(weights_C * value_C) for name, value_C in values.items()}
        if not gradients:
            return None, (sums, None)
        d_z_CxV = loss.gradient(z_CxV, t_CxV, targets_C, norms)
        d_z_CxV = (weights_C[:, None] * d_z_CxV).astype(hidden_CxD.dtype)
        d_hidden_CxD = vocabulary.across(
            jnp.matmul(d_z_CxV, head_VxD, preferred_element_type=precise)
        ).astype(hidden_CxD.dtype)
        return _add_head_gradient(d_head_VxD, d_z_CxV, hidden_CxD), (sums, d_hidden_CxD)

    tokens = (
        _tokens(counts_BxL, hidden_BxLxD),
        jnp.where(counts_BxL, targets_BxL, 0).ravel(),
        weights_BxL.ravel().astype(precise),
        _tokens(counts_BxL, teacher[0]) if teacher is not None else None,
    )
    start: Any = jnp.zeros(head_VxD.shape, precise) if gradients else None
    chunks = _chunked(tokens, static.config.chunk_tokens)
    d_head_VxD, (sums, d_hidden) = lax.scan(one_chunk, start, chunks)
    total = _over_batch(static.sharding)
    metrics = {name: total(jnp.sum(per_chunk)) for name, per_chunk in sums.items()}
    loss_sum = metrics.pop("loss")
    result = loss_sum, total(jnp.sum(weights_BxL.astype(precise))), metrics
    if not gradients:
        return result, None
    d_hidden_BxLxD = _unchunked(d_hidden, hidden_BxLxD.shape)
    return result, (d_hidden_BxLxD, _summed_head_gradient(static.sharding, d_head_VxD))


def _add_head_gradient(
    total_VxD: jax.Array, d_z_CxV: jax.Array, hidden_CxD: jax.Array
) -> jax.Array:
    """Adds a chunk's part to the head's gradient, some ids after the other.

    At once it would take a second array of the head's size to hold the product before it is added.
    """
    ids = total_VxD.shape[0]
    fewest = -(-total_VxD.nbytes // _HEAD_GRADIENT_BLOCK_BYTES)
    blocks = next(n for n in range(fewest, ids + 1) if ids % n == 0)

    def add(block: jax.Array, total_VxD: jax.Array) -> jax.Array:
        start, size = block * (ids // blocks), ids // blocks
        d_z_CxP = lax.dynamic_slice_in_dim(d_z_CxV, start, size, axis=1)
        part_PxD = lax.dot_general(
            d_z_CxP, hidden_CxD, (((0,), (0,)), ((), ())), preferred_element_type=total_VxD.dtype
        )
        part_PxD += lax.dynamic_slice_in_dim(total_VxD, start, size, axis=0)
        return lax.dynamic_update_slice_in_dim(total_VxD, part_PxD, start, axis=0)

    return lax.fori_loop(0, blocks, add, total_VxD)


class _Norms(NamedTuple):
    """What makes probabilities of a chunk's logits, [C] each; the last four with a teacher only.

    Attributes:
        log_z: log Σ exp z.
        student: log Σ exp (z / T).
        teacher: log Σ exp (t / τ).
        h: Σ h over all outcomes.
        rest: with teacher_top_k, log p of the rest and h of the rest.
    """

    log_z: jax.Array
    student: jax.Array | None = None
    teacher: jax.Array | None = None
    h: jax.Array | None = None
    rest: tuple[jax.Array, jax.Array] | None = None


class _Loss:
    """The loss of a chunk: z_CxV the student's logits, t_CxV the teacher's or None."""

    def __init__(self, config: LossConfig, omega: jax.Array, vocabulary: "_Vocabulary") -> None:
        self._config = config
        self._omega = omega
        self._vocabulary = vocabulary
        top_k = config.teacher_top_k
        self._top_k = top_k if top_k < vocabulary.vocab_size else 0
        squared = config.scale_by_temperature_squared
        self._scale = config.teacher_temperature**2 if squared else 1.0

    def values(
        self, z_CxV: jax.Array, t_CxV: jax.Array | None, targets_C: jax.Array
    ) -> tuple[dict[str, jax.Array], _Norms]:
        """`losses.token_losses` of the chunk, [C] each."""
        vocabulary, omega = self._vocabulary, self._omega
        largest_C = vocabulary.max(z_CxV)
        log_z_C = vocabulary.log_sum_exp(z_CxV, largest_C)
        truth_C = vocabulary.at(z_CxV, targets_C)
        hard_C = log_z_C - truth_C
        z_loss_C = self._config.z_loss * jnp.square(log_z_C)
        values = {"hard": hard_C, "correct": truth_C >= largest_C}
        if t_CxV is None:
            return {**values, "loss": hard_C + z_loss_C}, _Norms(log_z_C)

        most_C = vocabulary.max(t_CxV)
        soft_C, norms = self._soft(z_CxV, t_CxV, _Norms(log_z_C), largest_C, most_C)
        teacher_log_z_C = vocabulary.log_sum_exp(t_CxV, most_C)
        largest_C, most_C = lax.optimization_barrier((largest_C, most_C))
        both_CxV = (z_CxV >= largest_C[:, None]) & (t_CxV >= most_C[:, None])
        values["soft"] = soft_C
        values["teacher_hard"] = teacher_log_z_C - vocabulary.at(t_CxV, targets_C)
        values["agreement"] = vocabulary.max(both_CxV.astype(z_CxV.dtype))
        return {**values, "loss": (1.0 - omega) * hard_C + omega * soft_C + z_loss_C}, norms

    def gradient(
        self, z_CxV: jax.Array, t_CxV: jax.Array | None, targets_C: jax.Array, norms: _Norms
    ) -> jax.Array:
        """The loss's gradient by z, [C, V].

        It makes all probabilities anew: XLA, which would keep those that `values` made, [C, V] each
        and slower to write and read than to compute, is kept from seeing that they are the same.
        """
        norms = lax.optimization_barrier(norms)
        hard_share = 1.0 if t_CxV is None else 1.0 - self._omega
        p_CxV = jnp.exp(z_CxV - norms.log_z[:, None])
        d_z_CxV = (hard_share + 2.0 * self._config.z_loss * norms.log_z)[:, None] * p_CxV
        d_z_CxV -= jnp.where(self._vocabulary.is_id(targets_C), hard_share, 0.0)
        if t_CxV is None or norms.h is None:
            return d_z_CxV

        log_p_CxV, log_q_CxV = self._log_probabilities(z_CxV, t_CxV, norms)
        _, h_CxV = _divergence(log_p_CxV, log_q_CxV, self._config)
        if norms.rest is not None:
            rest_log_p_C, rest_h_C = norms.rest
            share_CxV = jnp.exp(jnp.minimum(log_p_CxV - rest_log_p_C[:, None], 0.0))
            top_CxV = self._vocabulary.top_k(log_q_CxV, self._top_k)
            h_CxV = jnp.where(top_CxV, h_CxV, rest_h_C[:, None] * share_CxV)
        d_soft_CxV = h_CxV - jnp.exp(log_p_CxV) * norms.h[:, None]
        return d_z_CxV + self._omega * self._scale / self._config.student_temperature * d_soft_CxV

    def _soft(
        self,
        z_CxV: jax.Array,
        t_CxV: jax.Array,
        norms: _Norms,
        largest_C: jax.Array,
        most_C: jax.Array,
    ) -> tuple[jax.Array, _Norms]:
        """soft [C], times τ² where that is asked for."""
        config, vocabulary = self._config, self._vocabulary

        def log_sum_exp(x_CxV: jax.Array, most_C: jax.Array, temperature: float) -> jax.Array:
            cooled_CxV = vocabulary.mask(_divided(x_CxV, temperature))
            return vocabulary.log_sum_exp(cooled_CxV, most_C / temperature)

        one = config.student_temperature == 1.0
        norms = norms._replace(
            student=norms.log_z
            if one
            else log_sum_exp(z_CxV, largest_C, config.student_temperature),
            teacher=log_sum_exp(t_CxV, most_C, config.teacher_temperature),
        )
        log_p_CxV, log_q_CxV = self._log_probabilities(z_CxV, t_CxV, norms)
        value_CxV, h_CxV = _divergence(log_p_CxV, log_q_CxV, config)
        if not self._top_k:
            # Σ -q is known.
            known = config.divergence == "forward_kl"
            h_C = -jnp.ones_like(most_C) if known else vocabulary.sum(h_CxV)
            return self._scale * vocabulary.sum(value_CxV), norms._replace(h=h_C)

        top_CxV = vocabulary.top_k(log_q_CxV, self._top_k)
        # Summed over the others: 1 - Σ of the k has no digits left where the k have nearly all.
        rest_log_p_C, rest_log_q_C = (
            vocabulary.log_sum_exp(jnp.where(top_CxV, LOG_ZERO, x)) for x in (log_p_CxV, log_q_CxV)
        )
        rest_value_C, rest_h_C = _divergence(rest_log_p_C, rest_log_q_C, config)
        soft_C = vocabulary.sum(jnp.where(top_CxV, value_CxV, 0.0)) + rest_value_C
        h_C = vocabulary.sum(jnp.where(top_CxV, h_CxV, 0.0)) + rest_h_C
        return self._scale * soft_C, norms._replace(h=h_C, rest=(rest_log_p_C, rest_h_C))

    def _log_probabilities(
        self, z_CxV: jax.Array, t_CxV: jax.Array, norms: _Norms
    ) -> tuple[jax.Array, jax.Array]:
        """log p and log q, at their temperatures."""
        assert norms.student is not None, "the teacher's norms are set"
        assert norms.teacher is not None, "the teacher's norms are set"
        config, mask = self._config, self._vocabulary.mask
        # Masked anew: a temperature may have moved the padding's "log 0" out of range.
        z_CxV = _divided(z_CxV, config.student_temperature)
        t_CxV = _divided(t_CxV, config.teacher_temperature)
        return mask(z_CxV - norms.student[:, None]), mask(t_CxV - norms.teacher[:, None])


def _divided(logits_CxV: jax.Array, temperature: float) -> jax.Array:
    """logits / temperature, to XLA another value at each use; see `_Loss.gradient`."""
    if temperature == 1.0:
        return logits_CxV
    inverse = lax.optimization_barrier(jnp.asarray(1.0 / temperature, logits_CxV.dtype))
    return logits_CxV * inverse


def _divergence(
    log_p: jax.Array, log_q: jax.Array, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Each outcome's part of the divergence, and its h."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if config.divergence == "forward_kl":
        return -q * log_p, -q
    if config.divergence == "reverse_kl":
        value = p * (log_p - log_q)
        return value, value
    beta = config.jsd_beta
    log_m = jnp.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
    h = (1.0 - beta) * p * (log_p - log_m)
    return beta * q * (log_q - log_m) + h, h


class _Vocabulary:
    """A device's part of the vocabulary, and reductions over the whole of it.

    Attributes:
        vocab_size: ids that mean something, on all devices together.
    """

    def __init__(self, sharding: HeadSharding | None, local_size: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._axes = sharding.vocab if sharding is not None else ()
        parts = sharding.devices(self._axes) if sharding is not None else 1
        self._size = local_size
        self._padded = local_size * parts != vocab_size
        self._first = lax.axis_index(self._axes) * local_size if self._axes else 0

    def logits(self, hidden_CxD: jax.Array, head_VxD: jax.Array) -> jax.Array:
        """[C, V] in float32 (or float64)."""
        precise = jnp.promote_types(hidden_CxD.dtype, jnp.float32)
        return self.mask(
            lax.dot_general(
                hidden_CxD, head_VxD, (((1,), (1,)), ((), ())), preferred_element_type=precise
            )
        )

    def max(self, x_CxV: jax.Array) -> jax.Array:
        """The largest over the vocabulary, [C]."""
        x_C = jnp.max(x_CxV, axis=-1)
        return lax.pmax(x_C, self._axes) if self._axes else x_C

    def sum(self, x_CxV: jax.Array) -> jax.Array:
        """The sum over the vocabulary, [C]."""
        return self.across(jnp.sum(x_CxV, axis=-1))

    def across(self, x: jax.Array) -> jax.Array:
        """The sum over the devices that share the vocabulary."""
        return lax.psum(x, self._axes) if self._axes else x

    def log_sum_exp(self, x_CxV: jax.Array, largest_C: jax.Array | None = None) -> jax.Array:
        """log Σ exp over the vocabulary, [C]."""
        largest_C = self.max(x_CxV) if largest_C is None else largest_C
        return largest_C + jnp.log(self.sum(jnp.exp(x_CxV - largest_C[:, None])))

    def at(self, x_CxV: jax.Array, ids_C: jax.Array) -> jax.Array:
        """The value of one id a token, [C]."""
        local_C = ids_C - self._first
        inside_C = (local_C >= 0) & (local_C < self._size)
        local_C = jnp.where(inside_C, local_C, 0)
        x_C = jnp.take_along_axis(x_CxV, local_C[:, None], axis=-1)[:, 0]
        return self.across(jnp.where(inside_C, x_C, 0)) if self._axes else x_C

    def is_id(self, ids_C: jax.Array) -> jax.Array:
        """[C, V] bool: is it this id?"""
        return ids_C[:, None] == self._ids()[None]

    def top_k(self, x_CxV: jax.Array, k: int) -> jax.Array:
        """[C, V] bool: is it among the k largest? The lower id first among equals."""
        values_Cxk, ids_Cxk = lax.top_k(x_CxV, min(k, self._size))
        ids_Cxk += self._first
        if self._axes:
            # In the order of the devices: among equals lax.top_k takes the first, the lower ids.
            gather = functools.partial(lax.all_gather, axis_name=self._axes, axis=1, tiled=True)
            values_Cxk, ids_Cxk = gather(values_Cxk), gather(ids_Cxk)
            _, which_Cxk = lax.top_k(values_Cxk, k)
            ids_Cxk = jnp.take_along_axis(ids_Cxk, which_Cxk, axis=1)
        local_Cxk = ids_Cxk - self._first
        outside = (local_Cxk < 0) | (local_Cxk >= self._size)
        local_Cxk = jnp.where(outside, self._size, local_Cxk)
        tokens_Cx1 = jnp.arange(x_CxV.shape[0])[:, None]
        none_CxV = jnp.zeros(x_CxV.shape, bool)
        return none_CxV.at[tokens_Cx1, local_Cxk].set(True, mode="drop")

    def _ids(self) -> jax.Array:
        return self._first + jnp.arange(self._size, dtype=jnp.int32)

    def mask(self, x_CxV: jax.Array) -> jax.Array:
        """[C, V] with padding's logits, or log probabilities, set to "log 0"."""
        if not self._padded:
            return x_CxV
        return jnp.where(self._ids()[None] < self.vocab_size, x_CxV, LOG_ZERO)


def _tokens(counts_BxL: jax.Array, hidden_BxLxD: jax.Array) -> jax.Array:
    """[B · L, D], zeros where nothing counts: 0 · NaN in a gradient would be NaN."""
    hidden_BxLxD = jnp.where(counts_BxL[..., None], hidden_BxLxD, 0)
    return hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1])


def _chunked(tokens: Any, chunk_tokens: int) -> Any:
    """[N, …] → [chunks, C, …], as few as chunk_tokens allows, of one size; the rest is zeros."""
    count = jax.tree.leaves(tokens)[0].shape[0]
    chunks = max(1, -(-count // chunk_tokens))
    size = -(-count // chunks)

    def one(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, chunks * size - count), *(((0, 0),) * (x.ndim - 1))))
        return x.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(one, tokens)


def _unchunked(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What _chunked took apart, back in the [B, L, …] it came from."""
    tokens = x.reshape(-1, *x.shape[2:])
    return tokens[: shape[0] * shape[1]].reshape(shape)


def _specs(sharding: HeadSharding, head_VxD: jax.Array) -> tuple[PartitionSpec, PartitionSpec]:
    """Of arrays with a leading batch, and of heads."""
    parts = sharding.devices(sharding.vocab)
    if head_VxD.shape[0] % parts:
        raise ValueError(
            f"A vocabulary padded to {head_VxD.shape[0]} ids can't be split over {parts} devices: "
            "set DecoderConfig.vocab_multiple to a multiple of the mesh's tensor axis."
        )
    return PartitionSpec(sharding.batch), PartitionSpec(sharding.vocab or None)


def _scattered(sharding: HeadSharding, head_VxD: jax.Array) -> tuple[str, ...]:
    """The axes over which the head's gradient is scattered, along D."""
    embed = sharding.embed
    divides = head_VxD.shape[1] % sharding.devices(embed) == 0
    return embed if divides and set(embed) <= set(sharding.batch) else ()


def _over_batch(sharding: HeadSharding | None) -> Callable[[jax.Array], jax.Array]:
    if sharding is None:
        return lambda x: x
    return lambda x: lax.psum(x, sharding.batch)


def _summed_head_gradient(sharding: HeadSharding | None, d_head_VxD: jax.Array) -> jax.Array:
    """Over all devices' tokens; each keeps the part of D that it holds of the head."""
    if sharding is None:
        return d_head_VxD
    scattered = _scattered(sharding, d_head_VxD)
    if scattered:
        d_head_VxD = lax.psum_scatter(d_head_VxD, scattered, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in sharding.batch if axis not in scattered)
    return lax.psum(d_head_VxD, rest) if rest else d_head_VxD
