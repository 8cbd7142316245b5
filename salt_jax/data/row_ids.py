"""Reads and writes row ids: ROW_IDS_FILE, an .npy of int64[m], ascending."""

import pathlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from salt_jax.data.npy_files import map_npy
from salt_jax.errors import InputError
from salt_jax.storage import durable_files
from salt_jax.storage.json_files import no_link_out
from salt_jax.storage.manifests import file_digest

ROW_IDS_FILE = "row_ids.npy"

_BLOCK_ROWS = 1 << 20


def write_row_ids(path: pathlib.Path, blocks: Iterable[np.ndarray]) -> int:
    """Writes blocks of ascending, distinct ids (at least one) as an .npy file, without holding them
    all in memory; returns how many."""
    rows, last = 0, -1
    with durable_files.whole_file(path) as file:
        _write_header(file, 0)
        length = file.tell()
        for block in blocks:
            ids_n = np.asarray(block, np.int64)
            assert ids_n.ndim == 1, f"a selection of shape {ids_n.shape}, expected [m]"
            assert np.all(np.diff(ids_n, prepend=last) > 0), "row ids must ascend, each once"
            file.write(np.ascontiguousarray(ids_n).tobytes())
            rows += len(ids_n)
            last = int(ids_n[-1]) if len(ids_n) else last
        assert rows, "a selection of no rows"
        file.seek(0)
        _write_header(file, rows)
        assert file.tell() == length, "the header of an .npy file has room for any count"
    return rows


def read_row_ids(folder: pathlib.Path, rows: int, digest: str, made_by: str) -> np.ndarray:
    """Memory-maps a folder's ids, int64[rows]; InputError, which names the command that made it, if
    the file is missing, not that of the digest, or its ids are negative or not ascending."""
    path, again = folder / ROW_IDS_FILE, f"copy the folder again, or run its `{made_by}` again"
    no_link_out(folder, path, again)
    ids_m = map_npy(path, np.dtype(np.int64), rows, again)
    if (found := file_digest(path)) != digest:
        raise InputError(
            f"{path} has the digest {found[:12]}…, its manifest says {digest[:12]}…: {again}."
        )
    last = -1
    for start in range(0, rows, _BLOCK_ROWS):
        ids_n = ids_m[start : start + _BLOCK_ROWS]
        if not np.all(np.diff(ids_n, prepend=last) > 0):
            raise InputError(f"{path}: its row ids don't ascend, each once: {again}.")
        last = int(ids_n[-1])
    return ids_m


def _write_header(file: BinaryIO, rows: int) -> None:
    header = {"descr": "<i8", "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
