"""Tells what a file that should hold text is, by its name and by its first bytes.

It holds rows of JSON, a Parquet table or plain text, perhaps compressed; anything else is refused.
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
# Those that are read, by what they hold.
COMPRESSIONS: Mapping[str, str] = {
    **{".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "xz"},
    **{".zst": "zstandard", ".zstd": "zstandard"},
}
# So many first bytes say what a file holds.
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
    # The second is a frame to be skipped, with which files for random access begin.
    "zstandard": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "LZ4 or another compression": re.compile(rb"\x04\x22\x4d\x18|LZIP\x01|\x1f\x9d|\xff\x06\0\0sN"),
    "a ZIP archive (or a document kept in one)": re.compile(rb"PK(\x03\x04|\x05\x06)"),
    "an archive": re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a|(?s:.{257})ustar"),
    "an Arrow table": re.compile(rb"ARROW1\0|FEA1\0|\xff\xff\xff\xff(?s:...)\0"),
    "a Parquet table": re.compile(rb"PAR1\x15"),
    "an array of NumPy's": re.compile(rb"\x93NUMPY"),
    "a PDF document": re.compile(rb"%PDF-[12]\."),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
    "text in UTF-16 or UTF-32": re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff"),
    "NUL bytes": re.compile(rb"(?s:.*?)\0"),
}


class FileKind(NamedTuple):
    """What a file's name says."""

    suffix: str  # once decompressed, in lower case (".jsonl"); "" without one
    compression: str  # of COMPRESSIONS' values; "" where it isn't compressed

    @property
    def is_json(self) -> bool:
        """Whether it holds rows of JSON."""
        return self.suffix in JSON_SUFFIXES


def kind_of(path: str | os.PathLike[str]) -> FileKind:
    """What a file holds, by its name: x.jsonl.gz is (".jsonl", "gzip").

    Raises:
      InputError: A name of something else than text, or one that is not UTF-8.
    """
    name = pathlib.PurePath(path)
    if valid_unicode(str(name)) != str(name):
        raise InputError(f"{path} is no name in UTF-8, as names in records must be: rename it.")
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
    """Refuses a file whose first bytes are of something else than its name says.

    Args:
      path: The file.
      head: Its first HEAD_BYTES.
      compression: What it should be compressed with; "" is not at all.
      decompressed: Whether `head` has been decompressed.
    """
    held = next((what for what, pattern in _HELD.items() if pattern.match(head)), "")
    if compression and not held and _is_text(head):
        raise InputError(
            f"{path} is not compressed with {compression}, as its name says: drop "
            f"{pathlib.PurePath(path).suffix} from its name, or fetch the file again."
        )
    # Whatever else a compressed file is, the library says that it cannot be decompressed.
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
    """A text's beginning without the byte order mark that some editors write in front of it."""
    return text.removeprefix(codecs.BOM_UTF8)
