"""Checks that a model's parameters are finite.

NaN compares as false, so a model of NaNs would rank every target first.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.errors import InputError
from salt_jax.training import partitioning

_MOST_NAMED = 3


class NotFiniteError(InputError):
    """A model has, or computes, a number that is not finite."""


def require_finite(params: Any, mesh: Mesh, checkpoint: pathlib.Path) -> None:
    """Raises NotFiniteError if parameters on the mesh, loaded from a checkpoint, are not finite."""
    whole = partitioning.replicated(mesh)
    are_finite = np.asarray(jax.jit(_are_finite, out_shardings=whole)(params))
    broken = [
        f"{'.'.join(str(part.key) for part in path)} ({leaf.dtype})"
        for (path, leaf), is_finite in zip(
            jax.tree.leaves_with_path(params), are_finite, strict=True
        )
        if not is_finite
    ]
    if broken:
        more = f" and {len(broken) - _MOST_NAMED} more" if len(broken) > _MOST_NAMED else ""
        raise NotFiniteError(
            f"The checkpoint {checkpoint} has values that are not finite, in "
            f"{', '.join(broken[:_MOST_NAMED])}{more}: use another one."
        )


def _are_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)])
