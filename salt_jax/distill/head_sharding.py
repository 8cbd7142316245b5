"""A head sharded over a mesh: gathering it, and reductions over a vocabulary split over devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from salt_jax.distill.divergences import LOG_ZERO
from salt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """How tokens and heads are sharded over a mesh while the loss is computed.

    Attributes:
      mesh: The mesh.
      batch: The mesh axes that split the batch.
      vocab: The axes that split the vocabulary, and so every token's logits.
      embed: The axes, a subset of batch's, that split D of stored heads. Gathering a head over them
        and scattering its gradient goes through parts of the vocabulary, which are contiguous and
        need no copy of the whole head in another layout.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    def devices(self, axes: tuple[str, ...]) -> int:
        """The number of devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def tokens(self) -> PartitionSpec:
        """The spec of arrays [B, …]."""
        return PartitionSpec(self.batch)

    def head(self, head_VxD: jax.Array) -> PartitionSpec:
        """The spec of a stored head and of its gradient; InputError if it can't be split."""
        if head_VxD.shape[0] % self.devices(self.vocab):
            raise InputError(
                f"A vocabulary padded to {head_VxD.shape[0]} ids can't be split over "
                f"{self.devices(self.vocab)} devices: set DecoderConfig.vocab_multiple to a "
                "multiple of the mesh's tensor axis."
            )
        return PartitionSpec(self.vocab or None, self._embed(head_VxD.shape[1]) or None)

    def gather(self, head_Vxd: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Gathers a device's part of the vocabulary, [V, D]; `shape` is the whole head's."""
        axes = self._embed(shape[1])
        if not axes:
            return head_Vxd
        if not self._divides_vocabulary(shape[0]):
            return lax.all_gather(head_Vxd, axes, axis=1, tiled=True)
        head_vxD = lax.all_to_all(head_Vxd, axes, split_axis=0, concat_axis=1, tiled=True)
        return lax.all_gather(head_vxD, axes, axis=0, tiled=True)

    def sum_and_scatter(self, gradient_VxD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Sums a head's gradient over all tokens; each device keeps the part that it stores."""
        axes = self._embed(shape[1])
        if axes and not self._divides_vocabulary(shape[0]):
            gradient_VxD = lax.psum_scatter(gradient_VxD, axes, scatter_dimension=1, tiled=True)
        elif axes:
            gradient_vxD = lax.psum_scatter(gradient_VxD, axes, scatter_dimension=0, tiled=True)
            gradient_VxD = lax.all_to_all(
                gradient_vxD, axes, split_axis=1, concat_axis=0, tiled=True
            )
        rest = tuple(axis for axis in self.batch if axis not in axes)
        return lax.psum(gradient_VxD, rest) if rest else gradient_VxD

    def _embed(self, width: int) -> tuple[str, ...]:
        """The axes that split D; none where they don't divide it, which replicates it."""
        return self.embed if width % self.devices(self.embed) == 0 else ()

    def _divides_vocabulary(self, ids: int) -> bool:
        """Whether the vocabulary can be split over the embed axes; splitting D costs copies."""
        return ids % self.devices((*self.vocab, *self.embed)) == 0


def gathered(
    sharding: HeadSharding | None, head_Vxd: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """HeadSharding.gather; on one device, the head itself."""
    return head_Vxd if sharding is None else sharding.gather(head_Vxd, shape)


class VocabularyPart:
    """A device's part of the vocabulary, and reductions over the whole of it.

    Args:
      sharding: The head's sharding; None on one device.
      local_size: V, the ids of this device.
      vocab_size: Number of ids in use on all devices together; ids from here on are padding.
      soft_cap: c of the logits c · tanh(z / c), or None.
    """

    def __init__(
        self,
        sharding: HeadSharding | None,
        local_size: int,
        vocab_size: int,
        soft_cap: float | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._soft_cap = soft_cap
        self._axes = sharding.vocab if sharding is not None else ()
        parts = sharding.devices(self._axes) if sharding is not None else 1
        self._size = local_size
        self._padded = local_size * parts != vocab_size
        self._first = lax.axis_index(self._axes) * local_size if self._axes else 0

    def logits(self, hidden_CxD: jax.Array, head_VxD: jax.Array) -> jax.Array:
        """[C, V] in float32 (or float64)."""
        precise = jnp.promote_types(hidden_CxD.dtype, jnp.float32)
        z_CxV = lax.dot_general(
            hidden_CxD, head_VxD, (((1,), (1,)), ((), ())), preferred_element_type=precise
        )
        if self._soft_cap is not None:
            z_CxV = self._soft_cap * jnp.tanh(z_CxV / self._soft_cap)
        return self.mask(z_CxV)

    def before_cap(self, d_z_CxV: jax.Array, z_CxV: jax.Array) -> jax.Array:
        """The gradient by the product of hidden states and head, from that by logits z."""
        if self._soft_cap is None:
            return d_z_CxV
        # The logits of padding are LOG_ZERO, whose square is infinite, and have the gradient 0.
        tanh_CxV = jnp.maximum(z_CxV / self._soft_cap, -1.0)
        return d_z_CxV * (1.0 - jnp.square(tanh_CxV))

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
        # Under autodiff the gradients of the largest cancel out.
        largest_C = lax.stop_gradient(self.max(x_CxV) if largest_C is None else largest_C)
        return largest_C + jnp.log(self.sum(jnp.exp(x_CxV - largest_C[:, None])))

    def log_rest(self, log_x_CxV: jax.Array, ids_CxK: jax.Array) -> jax.Array:
        """The log of the sum over all other ids, [C]."""
        # Summed over the others, since 1 - Σ over the k loses all digits where that sum is near 1.
        return self.log_sum_exp(self.put(log_x_CxV, ids_CxK, LOG_ZERO))

    def at(self, x_CxV: jax.Array, ids: jax.Array) -> jax.Array:
        """The value of one id per token, [C], or of K ids, [C, K]."""
        local = ids - self._first
        inside = (local >= 0) & (local < self._size)
        local_CxK = jnp.where(inside, local, 0).reshape(x_CxV.shape[0], -1)
        x = jnp.take_along_axis(x_CxV, local_CxK, axis=-1).reshape(ids.shape)
        return self.across(jnp.where(inside, x, 0)) if self._axes else x

    def put(self, x_CxV: jax.Array, ids_CxK: jax.Array, values: jax.Array | float) -> jax.Array:
        """x with new values, [C, K], at K ids per token."""
        local_CxK = ids_CxK - self._first
        outside = (local_CxK < 0) | (local_CxK >= self._size)
        local_CxK = jnp.where(outside, self._size, local_CxK)
        tokens_Cx1 = jnp.arange(x_CxV.shape[0])[:, None]
        return x_CxV.at[tokens_Cx1, local_CxK].set(values, mode="drop")

    def is_id(self, ids_C: jax.Array) -> jax.Array:
        """[C, V] bool: whether an id is the token's in ids_C."""
        return ids_C[:, None] == self._ids()[None]

    def largest(self, x_CxV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest values and their ids, [C, k]; of equal values the lower id first."""
        values_Cxk, ids_Cxk = lax.top_k(x_CxV, min(k, self._size))
        ids_Cxk += self._first
        if self._axes:
            # Gathered in the order of ids: of equal values lax.top_k takes the first.
            gather = functools.partial(lax.all_gather, axis_name=self._axes, axis=1, tiled=True)
            values_Cxk, ids_Cxk = gather(values_Cxk), gather(ids_Cxk)
            values_Cxk, which_Cxk = lax.top_k(values_Cxk, k)
            ids_Cxk = jnp.take_along_axis(ids_Cxk, which_Cxk, axis=1)
        return values_Cxk, ids_Cxk

    def _ids(self) -> jax.Array:
        return self._first + jnp.arange(self._size, dtype=jnp.int32)

    def mask(self, x_CxV: jax.Array) -> jax.Array:
        """x_CxV with the logits or log probabilities of padding set to LOG_ZERO."""
        if not self._padded:
            return x_CxV
        return jnp.where(self._ids()[None] < self.vocab_size, x_CxV, LOG_ZERO)
