"""The train state, its shapes and shardings, and its initialization. It holds no teacher."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.projection import ProjectionState, ProjectionTrainer


class TrainState(NamedTuple):
    """The student between two steps.

    Attributes:
      step: int32 scalar; completed steps, skipped updates included.
      params: The student's parameters, in param_dtype.
      opt_state: The optimizer's state.
      skipped_updates: int32 scalar; steps whose update was skipped because it wasn't finite.
      projection: That of LET in stage 1, replicated; None without one.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped_updates: jax.Array
    projection: ProjectionState | None = None


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes and shardings of a TrainState that is not allocated yet.

    `abstract` is a TrainState of ShapeDtypeStructs with shardings; `projection` trains its
    projection, if it has one.
    """

    config: decoder.DecoderConfig
    optimizer: optax.GradientTransformation
    abstract: TrainState
    mesh: Mesh
    rules: partitioning.Rules
    projection: ProjectionTrainer | None = None

    @property
    def of_stage2(self) -> "StateLayout":
        """The layout without the projection."""
        abstract = self.abstract._replace(projection=None)
        return dataclasses.replace(self, abstract=abstract, projection=None)

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def create(self, seed: int) -> TrainState:
        """A state with parameters initialized from `seed`, each shard on its own device."""

        def make(key: jax.Array) -> TrainState:
            return self._around(nn.unbox(decoder.init_params(self.config, key)), seed)

        with partitioning.partitioned(self.mesh, self.rules):
            return jax.jit(make, out_shardings=self.shardings)(jax.random.key(seed))

    def around(self, params: Any, seed: int) -> TrainState:
        """A state at step 0 with the given parameters, sharded by `shardings.params`.

        `seed` is that of the projection's initialization.
        """
        with partitioning.partitioned(self.mesh, self.rules):
            make = jax.jit(self._around, static_argnums=1, out_shardings=self.shardings)
            return make(params, seed)

    def _around(self, params: Any, seed: int) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        projection = self.projection.create(seed) if self.projection else None
        return TrainState(zero, params, self.optimizer.init(params), zero, projection)


def abstract_sharded_params(
    config: decoder.DecoderConfig, mesh: Mesh, rules: partitioning.Rules, dtype: Any = None
) -> Any:
    """Parameters as ShapeDtypeStructs with shardings, in `dtype` or the model's own.

    Norms are computed in float32, so their parameters keep their precision: then casting the others
    here gives the same bits as casting them at each use.
    """
    boxed = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    shardings = partitioning.param_shardings(boxed, mesh, rules)

    def one(path: Any, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        cast = leaf.dtype if dtype is None else jnp.dtype(dtype)
        if any(str(part.key).endswith("_norm") for part in path):
            cast = jnp.promote_types(cast, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, cast, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(boxed), shardings)


def make_layout(
    config: decoder.DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    projection: ProjectionTrainer | None = None,
) -> StateLayout:
    """The layout of a TrainState over the mesh."""
    params = abstract_sharded_params(config, mesh, rules)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        opt_state,
        partitioning.optimizer_shardings(opt_state, params, mesh),
    )
    replicated = partitioning.replicated(mesh)
    counter: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    projected = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(lambda: projection.create(0)) if projection else None,
    )
    abstract = TrainState(counter, params, opt_state, counter, projected)
    return StateLayout(config, optimizer, abstract, mesh, rules, projection)
