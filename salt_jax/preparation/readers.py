"""Documents out of files, one at a time.

In: a file: .jsonl, .jsonl.gz, .jsonl.zst or .parquet with a `text` a row (or the fields that a
template names) and perhaps a subset name, or any other file, which is one document of plain text.
Out: documents, in the file's order. Memory holds one block of a file and one line, whatever a
compressed file makes of itself: a line too long is refused.

A row's subset name is `meta.pile_set_name` (the Pile's), else `subset`; a plain file's is its
suffix ("py").

The libraries of compressed files are imported when one is read: what only describes a corpus needs
no more than the package itself does.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from salt_jax.data.buckets import open_file
from salt_jax.data.json_files import valid_unicode
from salt_jax.data.templates import Template, Unfit
from salt_jax.errors import InputError
from salt_jax.preparation.reading_log import ReadingLog

_BLOCK_BYTES = 1 << 20
# 4 bytes of a zstandard frame may stand for 128 KB: so much gives 32 MB at most.
_COMPRESSED_BYTES = 1 << 10
_MOST_LINE_BYTES = 256 << 20
_REPAIR = "mend the file{templates}, or skip such rows with skip_broken_lines=True"
_PLAIN = Template()


class Document(NamedTuple):
    """One document.

    Attributes:
      text: Valid Unicode (lone surrogates are replaced by U+FFFD).
      subset: The subset's name, "" where the row has none.
      place: Where it stands, for messages: the file and, where it has lines, the line.
      prompt: What stands before the text without being trained on; "" in plain documents.
    """

    text: str
    subset: str
    place: str
    prompt: str = ""

    @property
    def whole(self) -> str:
        """Prompt and text: what tells documents apart."""
        return self.prompt + self.text


def read_documents(
    path: pathlib.Path,
    *,
    skip_broken_lines: bool = False,
    log: ReadingLog | None = None,
    piece_bytes: int = 0,
    template: Template = _PLAIN,
) -> Iterator[Document]:
    """The documents of a file, empty ones included.

    Args:
      path: The file; its suffix says what it is.
      skip_broken_lines: Whether a line that is no JSON, or lacks what the template needs, is
        passed over.
      log: Where to note the file's digest and the lines passed over.
      piece_bytes: Plain text is cut at line ends into documents of about this size; 0 doesn't cut.
      template: How a row becomes a document.

    Raises:
      InputError: The file cannot be read, is cut short, or has a broken line: file and line are
        named; or it is plain text, and the template asks for fields.
    """
    name = path.name.lower()
    log = log or ReadingLog()
    if name.endswith(".parquet"):
        rows = _parquet_rows(path, template, log)
    elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        rows = _json_rows(path, log)
    elif name.endswith((".gz", ".zst")):
        raise InputError(
            f"{path} is compressed, but is no .jsonl.gz and no .jsonl.zst: decompress it first."
        )
    elif template != _PLAIN:
        raise InputError(
            f"{path} is plain text, and the templates need rows with {', '.join(template.fields)}: "
            "name .jsonl or .parquet files."
        )
    else:
        yield from _plain_documents(path, piece_bytes, log)
        return
    skipped = 0
    for place, row in rows:
        try:
            yield _document(row, place, template)
        except Unfit as error:
            if not skip_broken_lines:
                templates = "" if template == _PLAIN else ", or correct PROMPT and RESPONSE"
                raise InputError(
                    f"{place}: {error}: {_REPAIR.format(templates=templates)}."
                ) from error
            skipped += 1
            # Now, since the reader may stop at any document; a second reading counts anew.
            log.broken_lines[str(path)] = max(log.broken_lines[str(path)], skipped)


class _Broken(NamedTuple):
    """A line that is no JSON, and why."""

    reason: str


def _document(row: Any, place: str, template: Template) -> Document:
    """A row's document.

    Raises:
      Unfit: It is no JSON, or lacks what the template needs.
    """
    if isinstance(row, _Broken):
        raise Unfit(f"this is not JSON ({row.reason})")
    prompt, text = template.fill(row if isinstance(row, Mapping) else {})
    return Document(valid_unicode(text), _subset_name(row), place, valid_unicode(prompt))


def _subset_name(row: Mapping[str, Any]) -> str:
    """The name of a row's subset, "" where there is none.

    Raises:
      Unfit: It is no name.
    """
    meta = row.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
    name = row.get("subset") if name is None else name
    if not isinstance(name, str | int | float | None):
        raise Unfit(f"the subset's name is a {type(name).__name__}, expected a text")
    return "" if name is None else valid_unicode(str(name))


def _json_rows(path: pathlib.Path, log: ReadingLog) -> Iterator[tuple[str, Any]]:
    """Each non-blank line's place and value; a line that is no JSON gives _Broken."""
    for number, line in enumerate(_lines(path, log), start=1):
        if line.isspace() or not line:
            continue
        place = f"{path}, line {number}"
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield place, _Broken(str(error))


def _lines(path: pathlib.Path, log: ReadingLog) -> Iterator[bytes]:
    """The file's lines, without their line feeds."""
    number, held = 1, 0
    pieces: list[bytes] = []  # of line `number`
    try:
        for block in _blocks(path, log):
            first, *others = block.split(b"\n")
            pieces.append(first)
            held += len(first)
            if held > _MOST_LINE_BYTES:
                raise InputError(
                    f"{path}, line {number} has more than {_MOST_LINE_BYTES:,} bytes: cut it into "
                    "several documents, or leave the file out."
                )
            if others:
                yield b"".join(pieces)
                yield from others[:-1]
                number += len(others)
                pieces, held = others[-1:], len(others[-1])
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path} is cut short or damaged after line {number - 1} ({error}): "
            "fetch the file again."
        ) from error
    if held:
        yield b"".join(pieces)


def _blocks(path: pathlib.Path, log: ReadingLog) -> Iterator[bytes]:
    with _opened(path, log) as file:
        if path.name.lower().endswith(".zst"):
            yield from _zstandard_blocks(file)
            return
        stream = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses frame by frame: the library's stream reader takes a truncated frame for a whole
    one.

    Raises:
      EOFError: The file is cut short or damaged.
    """
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    inside_frame = False
    while compressed := file.read(_COMPRESSED_BYTES):
        while compressed:
            inside_frame = True
            try:
                block = frame.decompress(compressed)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            yield block
            if not frame.eof:
                break
            compressed = frame.unused_data
            inside_frame = False
            frame = zstandard.ZstdDecompressor().decompressobj()
    if inside_frame:
        raise EOFError("the last zstandard frame has no end")


def _parquet_rows(
    path: pathlib.Path, template: Template, log: ReadingLog
) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    with _opened(path, log, in_order=False) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            wanted = dict.fromkeys((*template.fields, "meta", "subset"))
            columns = [name for name in wanted if name in names]
            for field in template.fields:
                if field not in columns:
                    raise InputError(
                        f"{path} has no column `{field}`, it has "
                        f"{', '.join(names)}: rename the column, or correct the templates."
                    )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise InputError(
                f"{path} is no whole Parquet file ({error}): fetch the file again."
            ) from error


def _plain_documents(path: pathlib.Path, piece_bytes: int, log: ReadingLog) -> Iterator[Document]:
    """The file as one document, or as pieces; bytes that are no UTF-8 become U+FFFD."""
    subset = path.suffix.removeprefix(".").lower() or "text"
    with _opened(path, log) as file:
        if not piece_bytes:
            yield Document(file.read().decode(errors="replace"), subset, str(path))
            return
        for lines in iter(lambda: file.readlines(piece_bytes), []):
            yield Document(b"".join(lines).decode(errors="replace"), subset, str(path))


def _opened(path: pathlib.Path, log: ReadingLog, in_order: bool = True) -> BinaryIO:
    try:
        if in_order:
            return log.open(path)
        log.note(path)
        return open_file(path)[0]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): correct the task's files."
        ) from error
