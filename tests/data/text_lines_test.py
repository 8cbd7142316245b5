"""Rows of JSON are the same whatever they are compressed with; what is no text is named."""

import bz2
import codecs
import gzip
import json
import lzma
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zstandard

from salt_jax.data import text_lines
from salt_jax.data.file_kinds import kind_of
from salt_jax.data.text_lines import Broken, json_rows
from salt_jax.errors import InputError
from salt_jax.storage.buckets import open_file

ROWS = [{"text": f"zwei\nZeilen 🙂 {number}"} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2, ensure_ascii=False).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".zst": zstandard.ZstdCompressor().compress,
    ".zstd": zstandard.ZstdCompressor().compress,
    ".GZ": gzip.compress,
}


@pytest.fixture
def read(tmp_path: pathlib.Path) -> Callable[..., list[Any]]:
    def rows(name: str, data: bytes, **settings: Any) -> list[Any]:
        (tmp_path / name).write_bytes(data)
        with open_file(tmp_path / name)[0] as file:
            return [value for _, value in json_rows(tmp_path / name, file, **settings)]

    return rows


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSON", ".jsonlines"])
def test_lines_under_every_name(suffix, compression, read):
    for mark in (b"", codecs.BOM_UTF8):
        assert read(f"a{suffix}{compression}", PACK[compression](mark + LINES)) == ROWS


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_streams_one_after_another(compression, read):
    pack, name = PACK[compression], f"a.jsonl{compression}"
    cut = pack(LINES[:1000]) + pack(LINES[1000:])
    assert read(name, cut) == ROWS
    # Files put together, each with a byte order mark of its own.
    assert read(name, 2 * pack(codecs.BOM_UTF8 + LINES)) == 2 * ROWS
    for damaged in (cut[:-9], pack(LINES) + b"\x01" + pack(LINES)[1:]):
        with pytest.raises(InputError, match=f"{name} is cut short or damaged"):
            read(name, damaged)


def test_zeros_between_streams_of_xz(read):
    packed = lzma.compress(LINES[:1000]) + bytes(8) + lzma.compress(LINES[1000:]) + bytes(4)
    assert read("a.jsonl.xz", packed) == ROWS


@pytest.mark.parametrize("compression", ["", ".xz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_rows(indent, compression, read, monkeypatch):
    def made(rows: list[Any]) -> bytes:
        return codecs.BOM_UTF8 + json.dumps(rows, indent=indent, ensure_ascii=False).encode()

    array = made(ROWS)
    assert read(f"a.json{compression}", PACK[compression](array)) == ROWS
    assert read("a.json", b" [ ] \n") == []
    assert read("a.json", b"") == []
    # However the blocks fall: in the middle of a character, a value, a space.
    monkeypatch.setattr(text_lines, "decompressed_blocks", _single_bytes)
    assert read("a.json", made(ROWS[:50])) == ROWS[:50]


def _single_bytes(path: pathlib.Path, file: Any, compression: str) -> Iterator[bytes]:
    return (bytes([byte]) for byte in file.read())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (ARRAY[:-4], "row 300: this is not JSON"),
        (b'[{"text": "a"}, {"text": }]', "row 2: this is not JSON .Expecting value"),
        (b'[{"text": "a"} {"text": "b"}]', "'{' where ',' was expected"),
        (b'[{"text": "a"},', "row 2: this is not JSON"),
        (b'[{"text": "a"}', "the file's end where ',' was expected"),
        (b'[{"text": "a"}]\n[]', "has more after its array"),
        (b"[" * 9000, "row 1: this is not JSON"),
        (b'{\n  "text": "a"\n}\n', "is a JSON object over several lines"),
        (b'{"data": [\n  {"text": "a"}\n]}\n', "is a JSON object over several lines"),
    ],
)
def test_what_is_neither_lines_nor_an_array(array, said, read):
    with pytest.raises(InputError, match=f"a.json.*{said}"):
        read("a.json", array)


def test_bytes_that_are_no_utf_8(read):
    data = b'{"text": "sel marin\xe9"}\n'
    assert read("a.jsonl", data) == [{"text": "sel marin\ufffd"}]
    assert read("a.json", b"[" + data + b"]") == [{"text": "sel marin\ufffd"}]
    (broken,) = read("a.jsonl", data, strict=True)
    assert isinstance(broken, Broken)
    assert "not UTF-8" in broken.reason
    with pytest.raises(InputError, match=r"a\.json is not UTF-8"):
        read("a.json", b"[" + data + b"]", strict=True)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", gzip.compress(LINES, mtime=0), "compressed with gzip, .* name it ….gz"),
        ("a.jsonl", bz2.compress(LINES), "compressed with bzip2"),
        ("a.json", PACK[".zst"](LINES), "compressed with zstandard"),
        ("a.jsonl.gz", lzma.compress(LINES), "compressed with xz"),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(LINES, mtime=0), mtime=0),
            "once decompressed, holds gzip",
        ),
        ("a.jsonl.xz", lzma.compress(bytes(257) + b"ustar"), "holds an archive"),
        ("a.jsonl.gz", b"", "is empty"),
        ("a.jsonl", b"PK\3\4 and so on", "holds a ZIP archive"),
        ("a.jsonl", b"ARROW1\0\0", "holds an Arrow table"),
        ("a.jsonl", b"%PDF-1.7\n", "holds a PDF document"),
        ("a.jsonl", b"\x80\x04\x95", "holds a pickle"),
        ("a.jsonl", "a".encode("utf-16"), "holds text in UTF-16"),
        ("a.jsonl", "a".encode("utf-16-le"), "holds NUL bytes"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x90" + bytes(20), "longer window|cut short"),
    ],
)
def test_content_that_is_another_than_the_name_says(name, data, said, read):
    with pytest.raises(InputError, match=f"{name}.*({said})"):
        read(name, data)


@pytest.mark.parametrize("log", [27, 28, 31])
def test_long_windows_are_read(log, read):
    """What `zstd --long=LOG` makes."""
    settings = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=log < 31, chain_log=6)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    packed = compressor.compress(LINES) + compressor.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << log
    assert read("a.jsonl.zst", packed) == ROWS


def test_a_window_that_is_too_long_is_told_apart_from_damage(read, monkeypatch):
    monkeypatch.setattr("salt_jax.data.decompression._LONGEST_WINDOW", 1 << 20)
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    packed = compressor.compress(LINES) + compressor.flush()
    with pytest.raises(InputError, match=r"longer window .*: recompress it"):
        read("a.jsonl.zst", packed)


def test_a_dictionary_is_told_apart_from_damage(read):
    dictionary = zstandard.train_dictionary(4096, LINES.splitlines())
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(LINES)
    with pytest.raises(
        InputError, match=r"a dictionary of its own.*: recompress it, as by `zstd -dc -D "
    ):
        read("a.jsonl.zst", packed)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("a.tar.gz", "an archive"), ("a.TGZ", "an archive"), ("a.zip", "an archive")),
        *(("a.arrow", "an Arrow table"), ("a.jsonl.lz4", "compressed in a way that is not read")),
        *(("a.npy", "a file of arrays"), ("a.safetensors", "a binary file")),
        *(("a.docx", "a document"), ("a.jsonl.gz.zst", "compressed twice")),
        ("a.parquet.gz", "a compressed Parquet file"),
    ],
)
def test_names_of_what_is_no_text(name, what):
    with pytest.raises(InputError, match=f"^{name} is {what}"):
        kind_of(name)
