"""Memory-maps untrusted .npy files after checking their type and length."""

import os
import tokenize

import numpy as np

from salt_jax.errors import InputError


def map_npy(path: os.PathLike[str], dtype: np.dtype, rows: int, again: str) -> np.memmap:
    """An array of dtype[rows], mapped from disk; InputError, ending with what to do `again`, if it
    is missing, malformed or another array."""
    # numpy's own limit is 10,000, which some hundred columns exceed.
    longest = max(10_000, 2 * len(repr(dtype)))
    try:
        array = np.lib.format.open_memmap(os.fspath(path), mode="r", max_header_size=longest)
    # numpy reads the header as Python literals, with Python's tokenizer.
    except (OSError, ValueError, SyntaxError, tokenize.TokenError, OverflowError) as error:
        raise InputError(f"{path} cannot be read ({error}): {again}.") from error
    if array.dtype != dtype or array.shape != (rows,):
        raise InputError(
            f"{path} holds {array.dtype}{list(array.shape)}, its manifest says {dtype}[{rows}]: "
            f"{again}."
        )
    return array
