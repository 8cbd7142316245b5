"""Decompresses files in blocks of at most 32 MB, whatever their compression ratio.

All streams or frames of a file are read; a truncated or damaged one is always an error. zstandard,
an optional dependency, is imported only when needed.
"""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from salt_jax.errors import InputError

BLOCK_BYTES = 1 << 20
# Compressed bytes a step: 4 bytes of a zstandard frame may expand to 128 KB, so 32 MB at most.
_ZSTANDARD_BYTES = 1 << 10
# The largest window of `zstd --long=31`; only as much memory as a frame's own window is used.
_LONGEST_WINDOW = 1 << 31

# For undamaged files: part of zstandard's error → what it means, and zstd's options to decompress.
_UNREAD = {
    "memory": (
        "a longer window than can be read here, 2 GiB with enough memory",
        "--long=31 --memory=4GB",
    ),
    "ictionary": ("a dictionary of its own, which is not read", "-D DICTIONARY"),
}


def decompressed_blocks(
    path: str | os.PathLike[str], file: BinaryIO, compression: str
) -> Iterator[bytes]:
    """The decompressed bytes of a file; `path` is for messages, `compression` is one of the values
    of `file_kinds.COMPRESSIONS`, or "". InputError if it is truncated or damaged, or needs a
    missing library or more memory."""
    try:
        if compression == "zstandard":
            yield from _zstandard_blocks(path, file)
        elif compression == "bzip2":
            yield from _stream_blocks(file, bz2.BZ2Decompressor)
        elif compression == "xz":
            yield from _stream_blocks(file, lzma.LZMADecompressor)
        else:
            stream = gzip.GzipFile(fileobj=file) if compression else file
            while block := stream.read(BLOCK_BYTES):
                yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path} is cut short or damaged ({error}): fetch the file again."
        ) from error
    except MemoryError as error:
        raise InputError(
            f"{path} needs more memory to be decompressed than there is: recompress it with a "
            "lower setting."
        ) from error


def _stream_blocks(file: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
    """Decompresses stream by stream, since the libraries' own readers stop silently at a damaged
    stream and at zeros between streams."""
    stream, inside = make(), False
    while compressed := file.read(BLOCK_BYTES):
        while compressed := compressed if inside else compressed.lstrip(b"\0"):
            inside = True
            try:
                block = stream.decompress(compressed, BLOCK_BYTES)
                while block or not (stream.eof or stream.needs_input):
                    yield block
                    block = b"" if stream.eof else stream.decompress(b"", BLOCK_BYTES)
            except OSError as error:  # of bz2
                raise EOFError(str(error)) from error
            if not stream.eof:
                break
            compressed, stream, inside = stream.unused_data, make(), False
    if inside:
        raise EOFError("the last stream has no end")


def _zstandard_blocks(path: str | os.PathLike[str], file: BinaryIO) -> Iterator[bytes]:
    """Decompresses frame by frame, since the library's own reader accepts a truncated frame."""
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} needs the library zstandard, which is not installed: "
            "pip install 'salt_jax[prepare]'."
        ) from error

    def new() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()

    frame, inside = new(), False
    while compressed := file.read(_ZSTANDARD_BYTES):
        while compressed:
            inside = True
            try:
                block = frame.decompress(compressed)
            except zstandard.ZstdError as error:
                known = next((known for word, known in _UNREAD.items() if word in str(error)), None)
                if known is None:
                    raise EOFError(str(error)) from error
                raise InputError(
                    f"{path} was compressed with {known[0]} ({error}): recompress it, as by "
                    f"`zstd -dc {known[1]} FILE | zstd --long=27`."
                ) from error
            yield block
            if not frame.eof:
                break
            compressed, frame, inside = frame.unused_data, new(), False
    if inside:
        raise EOFError("the last zstandard frame has no end")
