"""Reads the documents of one file.

The file has JSON rows (.jsonl, .ndjson, .json) or is a .parquet, each row with `text` (or the
fields that a template names) and perhaps a subset name; any other file is one document of plain
text. All but Parquet may be compressed: .gz, .bz2, .xz, .zst. Files that are not text, by their
name or their first bytes, are refused (`data/file_kinds.py`), and so are overlong lines: memory
holds one block and one line.

A row's subset name is `meta.pile_set_name` (the Pile's), else `subset`; a plain file's is its
suffix ("py").
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from salt_jax.data.file_kinds import FileKind, kind_of
from salt_jax.data.text_lines import MOST_LINE_BYTES, Broken, json_rows, text_blocks
from salt_jax.errors import InputError
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.templates import Template, Unfit
from salt_jax.storage.buckets import open_file
from salt_jax.storage.json_files import valid_unicode

_PLAIN = Template()
# What may precede the first JSON row, or the first of an array.
_ROW = re.compile(rb"\s*(\[?)\s*(?=\{)")
_MOST_ROW_BYTES = 16 << 20


class Document(NamedTuple):
    """One document.

    Attributes:
      text: Valid Unicode (lone surrogates are replaced by U+FFFD).
      subset: The subset's name, "" if the row has none.
      place: The file, and the line if any, for messages.
      prompt: Precedes the text and is masked out of the loss; "" in plain documents.
    """

    text: str
    subset: str
    place: str
    prompt: str = ""

    @property
    def whole(self) -> str:
        """Prompt and text, the key by which documents are compared."""
        return self.prompt + self.text


def read_documents(
    path: pathlib.Path,
    *,
    skip_broken_lines: bool = False,
    log: ReadingLog | None = None,
    piece_bytes: int = 0,
    template: Template = _PLAIN,
) -> Iterator[Document]:
    """The documents of a file, empty ones included; InputError if it can't be read, is not text, is
    truncated, has a malformed line, or is plain text and the template needs fields.

    Args:
      path: The file; its suffix gives its format.
      skip_broken_lines: Whether to skip lines that are not JSON, or lack the template's fields.
      log: Records the file's digest and the lines skipped.
      piece_bytes: Plain text is cut at line ends into documents of about this size; 0 doesn't cut.
      template: Turns a row into a document.
    """
    kind = kind_of(path)
    log = log or ReadingLog()
    if kind.suffix == ".parquet":
        rows = _parquet_rows(path, template, log)
    elif kind.is_json:
        rows = _json_rows(path, log)
    elif template != _PLAIN:
        raise InputError(
            f"{path} is plain text, and the templates need rows with {', '.join(template.fields)}: "
            "name .jsonl, .json or .parquet files."
        )
    else:
        yield from _plain_documents(path, kind, piece_bytes, log)
        return
    skipped = 0
    for place, row in rows:
        try:
            yield _document(row, place, template)
        except Unfit as error:
            if not skip_broken_lines:
                templates = "" if template == _PLAIN else ", or correct PROMPT and RESPONSE"
                raise InputError(
                    f"{place}: {error}: correct the file{templates}, or skip such rows with "
                    "skip_broken_lines=True."
                ) from error
            skipped += 1
            # Recorded at once, since the caller may stop at any document; a second read resets it.
            log.broken_lines[str(path)] = max(log.broken_lines[str(path)], skipped)


def _document(row: Any, place: str, template: Template) -> Document:
    """A row's document; Unfit if it is not JSON, or lacks the template's fields."""
    if isinstance(row, Broken):
        raise Unfit(f"this is not JSON ({row.reason})")
    if not isinstance(row, Mapping):
        hint = " (name a file that holds one array .json)" * isinstance(row, list)
        raise Unfit(f"this row is a {type(row).__name__}, expected an object{hint}")
    prompt, text = template.fill(row)
    meta = row.get("meta")
    subset = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
    subset = row.get("subset") if subset is None else subset
    if not isinstance(subset, str | int | float | None):
        raise Unfit(f"the subset's name is a {type(subset).__name__}, expected a string")
    name = "" if subset is None else valid_unicode(str(subset))
    return Document(valid_unicode(text), name, place, valid_unicode(prompt))


def _json_rows(path: pathlib.Path, log: ReadingLog) -> Iterator[tuple[str, Any]]:
    with _opened(path, log) as file:
        yield from json_rows(path, file)


def _parquet_rows(
    path: pathlib.Path, template: Template, log: ReadingLog
) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _opened(path, log, sequential=False) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            schema = table.schema_arrow
            for field in template.fields:
                if field not in schema.names:
                    raise InputError(
                        f"{path} has no column `{field}`, it has {', '.join(schema.names)}: rename "
                        "the column, or correct the templates."
                    )
            columns = [name for name in (*template.fields, "subset") if name in schema.names]
            if "meta" in schema.names and pyarrow.types.is_struct(schema.field("meta").type):
                columns.append("meta.pile_set_name")
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for values in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    row = dict(zip(batch.schema.names, values, strict=True))
                    yield f"{path}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            if "UTF8" in str(error):  # e.g. in a dictionary column that Arrow converts
                raise InputError(
                    f"{path} has text that is not UTF-8 after row {number}, in a column whose type "
                    "Arrow can't read without UTF-8: write it as a column of strings."
                ) from error
            raise InputError(
                f"{path} is not a complete Parquet file ({error}): fetch the file again."
            ) from error


def _values(column: Any) -> list[Any]:
    """A column's values. Text may have any of Arrow's string or binary types; invalid UTF-8 becomes
    U+FFFD."""
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    kind = column.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _values(column.storage)
    if types.is_dictionary(kind):
        texts = _values(column.dictionary)
        return [None if index is None else texts[index] for index in column.indices.to_pylist()]
    if types.is_struct(kind):
        rows = zip(*map(_values, column.flatten()), strict=True)
        names = [field.name for field in kind]
        return [dict(zip(names, row, strict=True)) for row in rows]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = iter(_values(column.flatten()))  # without those of lists that are null
        sizes = pyarrow.compute.list_value_length(column).to_pylist()
        return [None if size is None else list(itertools.islice(inner, size)) for size in sizes]
    if types.is_nested(kind):
        return [[]] * len(column)  # a map or a union: not text
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
    if any(is_text(kind) for is_text in (*strings, *binaries)):
        texts = column.cast(pyarrow.large_binary()).to_pylist()
        return [text if text is None else text.decode(errors="replace") for text in texts]
    return column.to_pylist()


def _plain_documents(
    path: pathlib.Path, kind: FileKind, piece_bytes: int, log: ReadingLog
) -> Iterator[Document]:
    """The file as one document or in pieces; invalid UTF-8 becomes U+FFFD."""
    subset = kind.suffix.removeprefix(".") or "text"
    with _opened(path, log) as file:
        blocks = text_blocks(path, file)
        for number, piece in enumerate(_pieces(path, blocks, piece_bytes, kind.compression)):
            if b"\0" in piece:
                raise InputError(
                    f"{path} holds NUL bytes, so it is not text: convert it, or leave it out of "
                    "the files."
                )
            if not number:
                _refuse_rows(path, piece)
            yield Document(piece.decode(errors="replace"), subset, str(path))


def _pieces(
    path: pathlib.Path, blocks: Iterator[bytes], piece_bytes: int, compression: str
) -> Iterator[bytearray]:
    """The text, cut at the first line end after every `piece_bytes`; 0 doesn't cut."""
    held, searched = bytearray(), 0
    for block in blocks:
        held += block
        start = 0
        while piece_bytes:
            end = held.find(b"\n", max(start + piece_bytes, searched)) + 1
            if not end:
                break
            yield held[start:end]
            start = end
        del held[:start]
        searched = len(held)
        if compression and searched > MOST_LINE_BYTES:
            raise InputError(
                f"{path} gives a document of more than {MOST_LINE_BYTES:,} bytes: cut it by "
                "TextFiles.piece_bytes, or leave the file out."
            )
    if held or not piece_bytes:
        yield held


def _refuse_rows(path: pathlib.Path, text: bytearray) -> None:
    """Refuses JSON rows in a file whose name says plain text."""
    start = _ROW.match(text)
    if start is None:
        return
    is_array, end = bool(start[1]), text.find(b"\n", start.end())
    # An array's first element may share its line with others, or take several lines.
    end = start.end() + _MOST_ROW_BYTES if is_array or end < 0 else end
    try:
        head = text[start.end() : end].decode(errors="replace")
        row, _ = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return
    if "text" in row:
        raise InputError(
            f"{path} holds {'an array' * is_array or 'rows'} of JSON, which its name doesn't say: "
            f"name it ….json{'l' * (not is_array)} (before a ….gz, ….zst and so on)."
        )


def _opened(path: pathlib.Path, log: ReadingLog, sequential: bool = True) -> BinaryIO:
    try:
        if sequential:
            return log.open(path)
        log.note(path)
        return open_file(path)[0]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): correct the task's files."
        ) from error
