"""Numbers that are not finite: a model's parameters in, an error out.

NaN is neither more nor less than any number: taken for one, it makes every prediction a right one.
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
    """A model gives a number that is not finite."""


def require_finite(params: Any, mesh: Mesh, checkpoint: pathlib.Path) -> None:
    """Refuses a model of which a parameter is NaN or infinite.

    Args:
      params: On the mesh.
      mesh: Where they lie.
      checkpoint: Where they come from, for the error.

    Raises:
      NotFiniteError: With the tensors' names.
    """
    whole = partitioning.replicated(mesh)
    are_finite = np.asarray(jax.jit(_are_finite, out_shardings=whole)(params))
    leaves = jax.tree.leaves_with_path(params)
    broken = [
        f"{'.'.join(str(part.key) for part in path)} ({leaf.dtype})"
        for (path, leaf), is_finite in zip(leaves, are_finite, strict=True)
        if not is_finite
    ]
    if broken:
        more = f" and {len(broken) - _MOST_NAMED} more" if len(broken) > _MOST_NAMED else ""
        raise NotFiniteError(
            f"The checkpoint {checkpoint} has numbers that are not finite, in "
            f"{', '.join(broken[:_MOST_NAMED])}{more}: use another one."
        )


def _are_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)])
