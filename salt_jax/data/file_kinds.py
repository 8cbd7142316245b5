"""Detects the format of a text file by its name and its first bytes.

JSON rows, Parquet tables and plain text are accepted, compressed or not; anything else is refused.
"""

import codecs
import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from salt_jax.errors import InputError
from salt_jax.storage.json_files import valid_unicode

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
# The suffixes that are read.
COMPRESSIONS: Mapping[str, str] = {
    **{".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "xz"},
    **{".zst": "zstandard", ".zstd": "zstandard"},
}
# The first bytes of a file, enough to tell its format.
HEAD_BYTES = 512

_NOT_TEXT: Mapping[str, str] = {
    suffix: what
    for what, suffixes in {
        "an archive": ".zip .tar .tgz .tbz .tbz2 .txz .tzst .7z .rar .jar .whl",
        "compressed in a way that is not read": ".lz4 .br .lz .lzo .snappy .sz .z",
        "an Arrow table": ".arrow .feather .ipc",
        "a table of another format": ".orc .avro .tfrecord .tfrecords .array_record .h5 .hdf5",
        "a file of arrays": ".npy .npz",
        "a binary file": ".bin .safetensors .gguf .pkl .pickle",
        "a document, not its text": ".pdf .docx .xlsx .pptx .odt .epub",
    }.items()
    for suffix in suffixes.split()
}
_HELD: Mapping[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    # The second is a skippable frame, with which seekable files begin.
    "zstandard": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "LZ4 or another compression": re.compile(rb"\x04\x22\x4d\x18|LZIP\x01|\x1f\x9d|\xff\x06\0\0sN"),
    "a ZIP archive (or a document kept in one)": re.compile(rb"PK(\x03\x04|\x05\x06)"),
    "an archive": re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a|(?s:.{257})ustar"),
    "an Arrow table": re.compile(rb"ARROW1\0|FEA1\0|\xff\xff\xff\xff(?s:...)\0"),
    "a Parquet table": re.compile(rb"PAR1\x15"),
    "a NumPy array": re.compile(rb"\x93NUMPY"),
    "a PDF document": re.compile(rb"%PDF-[12]\."),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
    "text in UTF-16 or UTF-32": re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff"),
    "NUL bytes": re.compile(rb"(?s:.*?)\0"),
}


class FileKind(NamedTuple):
    """A file's format by its name."""

    suffix: str  # once decompressed, in lower case (".jsonl"); "" without one
    compression: str  # of COMPRESSIONS' values; "" where it isn't compressed

    @property
    def is_json(self) -> bool:
        """Whether it holds rows of JSON."""
        return self.suffix in JSON_SUFFIXES


def kind_of(path: str | os.PathLike[str]) -> FileKind:
    """A file's format by its name: x.jsonl.gz is (".jsonl", "gzip"); InputError if the name is not
    that of a text file, or not UTF-8."""
    name = pathlib.PurePath(path)
    if valid_unicode(str(name)) != str(name):
        raise InputError(f"{path} is not a UTF-8 name, as names in records must be: rename it.")
    compression = COMPRESSIONS.get(name.suffix.lower(), "")
    suffix = (name.with_suffix("") if compression else name).suffix.lower()
    what = _NOT_TEXT.get(suffix)
    if compression and (suffix in COMPRESSIONS or suffix == ".parquet"):
        what = "compressed twice" if suffix in COMPRESSIONS else "a compressed Parquet file"
    if what:
        raise InputError(
            f"{path} is {what}, by its name, and not read as text: unpack or convert it, or leave "
            "it out of the files."
        )
    return FileKind(suffix, compression)


def refuse_other_content(
    path: str | os.PathLike[str], head: bytes, compression: str, decompressed: bool = False
) -> None:
    """Refuses a file whose content, by its first HEAD_BYTES, doesn't match the compression that its
    name says ("" for none); `decompressed` says whether `head` is."""
    held = next((what for what, pattern in _HELD.items() if pattern.match(head)), "")
    if compression and not held and _is_text(head):
        raise InputError(
            f"{path} is not compressed with {compression}, as its name says: drop "
            f"{pathlib.PurePath(path).suffix} from its name, or fetch the file again."
        )
    # Other mismatches of compressed files are reported by the decompressor.
    if held in ("", compression) or (compression and held not in COMPRESSIONS.values()):
        return
    where = ", once decompressed," if decompressed else ""
    if held in COMPRESSIONS.values() and not decompressed:
        suffix = next(suffix for suffix, name in COMPRESSIONS.items() if name == held)
        raise InputError(
            f"{path} is compressed with {held}, which its name doesn't say: name it …{suffix}, or "
            "decompress it."
        )
    raise InputError(
        f"{path}{where} holds {held}, expected text in UTF-8: unpack or convert it, or leave it "
        "out of the files."
    )


def _is_text(head: bytes) -> bool:
    try:  # the last character may be cut
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def without_mark(text: bytes) -> bytes:
    """The beginning of a text without its byte order mark, if any."""
    return text.removeprefix(codecs.BOM_UTF8)
