"""Reads text files, compressed or not, as blocks, lines, or JSON rows with their places.

Only a block and a line are held in memory; overlong lines and files that are not text
(`file_kinds`) are refused. A leading byte order mark is dropped.
"""

import codecs
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from salt_jax.data.decompression import BLOCK_BYTES, decompressed_blocks
from salt_jax.data.file_kinds import HEAD_BYTES, kind_of, refuse_other_content, without_mark
from salt_jax.errors import InputError

MOST_LINE_BYTES = 256 << 20

Path = str | os.PathLike[str]
_SPACE = re.compile(r"\s*")


class Broken(NamedTuple):
    """Stands for the row of a malformed line, with the reason."""

    reason: str


def text_blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """A file's text in decompressed blocks; `path` is its name, which says the compression.
    InputError if it is not text, truncated or damaged, or its name doesn't match its
    compression."""
    kind = kind_of(path)
    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, BLOCK_BYTES)  # type: ignore[type-var]
    packed = reader.peek(HEAD_BYTES)[:HEAD_BYTES]
    if kind.compression and not packed:
        raise InputError(f"{path} is empty, which no compressed file is: fetch the file again.")
    refuse_other_content(path, packed, kind.compression)
    head, blocks = _head_of(decompressed_blocks(path, reader, kind.compression))
    if kind.compression:
        refuse_other_content(path, head[:HEAD_BYTES], "", decompressed=True)
    yield without_mark(next(blocks))
    yield from blocks


def text_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """A file's lines without their line feeds; InputError for a line over 256 MiB. See
    `text_blocks`."""
    return _lines(path, text_blocks(path, file))


def json_rows(path: Path, file: BinaryIO, strict: bool = False) -> Iterator[tuple[str, Any]]:
    """A file's JSON rows: its lines, or the elements of a .json file's array; blank lines are
    skipped. Yields each row's place ("FILE, line 3") and value, `Broken` for a malformed line.

    With `strict`, invalid UTF-8 is an error; otherwise it becomes U+FFFD. InputError as
    `text_lines`, or if a .json file is one object over several lines, or a malformed array.
    """
    blocks = text_blocks(path, file)
    if kind_of(path).suffix == ".json":
        head, blocks = _head_of(blocks)
        first = head.lstrip()
        if first.startswith(b"["):
            yield from _Array(path, blocks, strict).rows()
            return
        if re.match(rb"\{[^\n]*(?<=[{\[,])\s*\n", first):
            raise InputError(
                f"{path} is a JSON object over several lines, expected a row on each line, or an "
                "array of rows: rewrite it (jq -c), or leave it out of the files."
            )
    for number, line in enumerate(_lines(path, blocks), start=1):
        if line.isspace() or not line:
            continue
        try:
            value = json.loads(without_mark(line).decode(errors="strict" if strict else "replace"))
        except UnicodeDecodeError as error:
            value = Broken(f"it is not UTF-8: {error}")
        except (ValueError, RecursionError) as error:
            value = Broken(str(error))
        yield f"{path}, line {number}", value


def _lines(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    number, held = 1, 0
    pieces: list[bytes] = []  # of line `number`
    for block in blocks:
        first, *others = block.split(b"\n")
        pieces.append(first)
        held += len(first)
        if held > MOST_LINE_BYTES:
            raise InputError(
                f"{path}, line {number} has more than {MOST_LINE_BYTES:,} bytes: cut it into "
                "several documents, or leave the file out."
            )
        if others:
            yield b"".join(pieces)
            yield from others[:-1]
            number += len(others)
            pieces, held = others[-1:], len(others[-1])
    if held:
        yield b"".join(pieces)


class _Array:
    """A JSON array of rows, parsed incrementally."""

    def __init__(self, path: Path, blocks: Iterator[bytes], strict: bool) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("strict" if strict else "replace")
        self._path, self._held, self._at = path, "", 0
        self._pieces = map(decoder.decode, blocks)

    def rows(self) -> Iterator[tuple[str, Any]]:
        """The elements and their places, parsed one at a time."""
        number = 0
        self._take("[")
        while self._next() != "]":
            if number:
                self._take(",")
            number += 1
            yield f"{self._path}, row {number}", self._parsed(f"{self._path}, row {number}")
        self._take("]")
        if self._next():
            raise InputError(f"{self._path} has more after its array of rows: make it one array.")

    def _next(self) -> str:
        """Peeks at the next non-space character; "" at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read(1):
                return ""

    def _take(self, expected: str) -> None:
        if self._next() != expected:
            found = repr(self._next()) if self._next() else "the file's end"
            raise InputError(
                f"{self._path} is not a JSON array of rows, it has {found} where {expected!r} was "
                "expected: correct the file, or leave it out."
            )
        self._at += 1

    def _parsed(self, place: str) -> Any:
        """Parses and consumes the next value."""
        self._next()
        while True:
            try:
                value, self._at = json.JSONDecoder().raw_decode(self._held, self._at)
                return value
            except (ValueError, RecursionError) as error:
                # Perhaps incomplete: reads twice as much, so that time stays linear in the text.
                if not self._read(len(self._held) - self._at):
                    raise InputError(
                        f"{place}: this is not JSON ({getattr(error, 'msg', error)}): correct the "
                        "file, or leave it out."
                    ) from error

    def _read(self, characters: int) -> bool:
        """Buffers at least so many more characters, if there are any, and drops consumed ones."""
        pieces, more = [self._held[self._at :]], 0
        while more < max(characters, 1) and len(pieces[0]) + more <= MOST_LINE_BYTES:
            try:
                piece = next(self._pieces, None)
            except UnicodeDecodeError as error:
                raise InputError(f"{self._path} is not UTF-8 ({error}): convert it.") from error
            if piece is None:
                break
            pieces.append(piece)
            more += len(piece)
        self._held, self._at = "".join(pieces), 0
        return more > 0


def _head_of(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first HEAD_BYTES or more, and all blocks, these included."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return head, itertools.chain([head], blocks)
