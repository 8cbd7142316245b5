"""What a training run carries from step to step; the teacher is no part of it.

In: a model and an optimizer. Out: TrainState, sharded from its first moment on.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from salt_jax.models import decoder
from salt_jax.training import partitioning


class TrainState(NamedTuple):
    """The student between two steps.

    Attributes:
      step: int32 scalar; steps done, skipped updates included.
      params: The student's parameters, param_dtype.
      opt_state: The optimizer's state.
      skipped_updates: int32 scalar; steps whose update was not finite and therefore not applied.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped_updates: jax.Array


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes and shardings of a TrainState; nothing is allocated yet.

    Attributes:
      config: The model.
      optimizer: The transformation that updates it.
      abstract: A TrainState of ShapeDtypeStructs with their shardings.
      mesh: Where it lives.
      rules: From logical to mesh axes.
    """

    config: decoder.DecoderConfig
    optimizer: optax.GradientTransformation
    abstract: TrainState
    mesh: Mesh
    rules: partitioning.Rules

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def create(self, seed: int) -> TrainState:
        """A fresh state, made in place on every device from `seed`."""

        def make(key: jax.Array) -> TrainState:
            params = nn.unbox(decoder.init_params(self.config, key))
            return self._around(params)

        with partitioning.partitioned(self.mesh, self.rules):
            return jax.jit(make, out_shardings=self.shardings)(jax.random.key(seed))

    def around(self, params: Any) -> TrainState:
        """A fresh state around given parameters, which must lie as `shardings.params` says."""
        with partitioning.partitioned(self.mesh, self.rules):
            return jax.jit(self._around, out_shardings=self.shardings)(params)

    def _around(self, params: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, self.optimizer.init(params), zero)


def abstract_sharded_params(
    config: decoder.DecoderConfig, mesh: Mesh, rules: partitioning.Rules, dtype: Any = None
) -> Any:
    """Parameters as ShapeDtypeStructs with shardings, in `dtype` or the model's own.

    Those of norms, which are computed in float32, lose nothing of their own: the model computes the
    same, bit for bit, whether its other parameters are cast here or at each use.
    """
    boxed = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    shardings = partitioning.param_shardings(boxed, mesh, rules)

    def laid_out(path: Any, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        of_norm = any(str(part.key).endswith("_norm") for part in path)
        kept = leaf.dtype if dtype is None else jnp.dtype(dtype)
        if of_norm:
            kept = jnp.promote_types(kept, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=sharding)

    return jax.tree_util.tree_map_with_path(laid_out, nn.unbox(boxed), shardings)


def make_layout(
    config: decoder.DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> StateLayout:
    """Lays a TrainState out over the mesh."""
    params = abstract_sharded_params(config, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_shardings = partitioning.optimizer_shardings(opt_state, params, shardings, mesh)
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        opt_state,
        opt_shardings,
    )
    counter: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh))
    return StateLayout(
        config, optimizer, TrainState(counter, params, opt_state, counter), mesh, rules
    )
