"""Settings that are read from the environment."""

import os

from salt_jax.errors import InputError


def seconds(variable: str, default: str) -> float:
    """The seconds that an environment variable sets; InputError unless they are above 0."""
    given = os.environ.get(variable) or default
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise InputError(f"{variable} is {given!r}, expected seconds above 0: correct it.")
    return found
