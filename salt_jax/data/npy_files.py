"""Memory-maps untrusted .npy files after checking their type and length."""

import pathlib
import tokenize

import numpy as np

from salt_jax.errors import InputError


def map_npy(path: pathlib.Path, dtype: np.dtype, rows: int, again: str) -> np.memmap:
    """A memory-mapped array of dtype[rows]; InputError, ending in `again` (what to do), if the file
    is missing, malformed or of another type or length."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    # numpy parses the header with Python's tokenizer, which raises errors of its own.
    except (OSError, ValueError, SyntaxError, tokenize.TokenError, OverflowError) as error:
        raise InputError(f"{path} cannot be read ({error}): {again}.") from error
    if array.dtype != dtype or array.shape != (rows,):
        raise InputError(
            f"{path} holds {array.dtype}{list(array.shape)}, its manifest says {dtype}[{rows}]: "
            f"{again}."
        )
    return array
