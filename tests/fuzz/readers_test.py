"""Files of documents that anyone may have made: documents or one sentence, in bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.data.decompression import decompressed_blocks
from salt_jax.errors import InputError
from salt_jax.preparation import readers
from salt_jax.preparation.readers import read_documents

fuzzed = settings(
    max_examples=int(os.environ.get("SALT_FUZZ_EXAMPLES", "30")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TEXTS = st.text(st.characters(exclude_categories=()))  # surrogates and NUL too
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.fixed_dictionaries(
    {"text": TEXTS | ANYTHING},
    optional={"meta": st.dictionaries(st.just("pile_set_name"), ANYTHING), "subset": ANYTHING},
)
LINES = st.one_of(
    (ROWS | ANYTHING).map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=40),
    st.integers(1, 5000).map(lambda depth: b"[" * depth),
    st.integers(1, 5000).map(lambda depth: b'{"text": ' * depth + b"1" + b"}" * depth),
    st.integers(1, 9000).map(lambda digits: b'{"text": "a", "n": ' + b"9" * digits + b"}"),
)
FILES = st.lists(LINES, max_size=5).map(b"\n".join)
PACK = {
    ".jsonl": lambda data: data,
    ".json": lambda data: data,
    ".jsonl.gz": gzip.compress,
    ".jsonl.bz2": bz2.compress,
    ".jsonl.xz": lzma.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
}


def read(path: pathlib.Path, **settings: Any) -> list[readers.Document]:
    """The documents up to where the file is refused, all of which a tokenizer must take."""
    documents = []
    try:
        for document in read_documents(path, **settings):
            documents.append(document)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 (some files are read whole)
    for document in documents:
        (document.text + document.subset).encode()
    return documents


@pytest.mark.parametrize("suffix", PACK)
@fuzzed
@given(data=FILES, skip=st.booleans())
def test_lines_of_anything(suffix: str, data: bytes, skip: bool, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](data))
    read(path, skip_broken_lines=skip)


WHOLE = b"".join(json.dumps({"text": f"{n} " * 40}).encode() + b"\n" for n in range(200))


@pytest.mark.parametrize("suffix", PACK)
@fuzzed
@given(data=st.data())
def test_damaged_files(suffix: str, data: st.DataObject, tmp_path: pathlib.Path) -> None:
    """Cut short, with bytes changed, with something before or after."""
    packed = bytearray(PACK[suffix](WHOLE))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(packed) - 1))
        packed[place] ^= data.draw(st.integers(1, 255))
    start = data.draw(st.integers(0, 20))
    end = data.draw(st.integers(start, len(packed)) | st.just(len(packed)))
    path = tmp_path / f"a{suffix}"
    around = st.binary(max_size=9)
    path.write_bytes(data.draw(around) + bytes(packed[start:end]) + data.draw(around))
    read(path, skip_broken_lines=data.draw(st.booleans()))


@fuzzed
@given(frames=st.lists(FILES, max_size=4), skipped=st.binary(max_size=30))
def test_frames_are_one_text(frames: list[bytes], skipped: bytes, tmp_path: pathlib.Path) -> None:
    """However a text is cut into frames, with a frame to be skipped between them, too."""
    skippable = (0x184D2A50).to_bytes(4, "little") + len(skipped).to_bytes(4, "little") + skipped
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl.zst"
    whole.write_bytes(b"".join(frames))
    cut.write_bytes(skippable.join(map(PACK[".jsonl.zst"], frames)))
    texts = [[d.text for d in read(path, skip_broken_lines=True)] for path in (whole, cut)]
    assert texts[0] == texts[1]


# A frame of a few hundred KB that stands for 8 GB, read in an address space of 3 GB.
BOMB = """
import pathlib, resource, sys
from salt_jax.errors import InputError
from salt_jax.preparation.readers import read_documents

import zstandard  # the libraries' own address space is not what is measured
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
count = 0
try:
    for document in read_documents(pathlib.Path(sys.argv[1])):
        count += 1
except InputError as error:
    print(f"{count} documents, then: {error}")
else:
    print(f"{count} documents")
"""


@pytest.mark.parametrize(
    ("line", "lines", "said"),
    [
        (b" " * (1 << 23), 1024, "line 1 has more than 268,435,456 bytes"),
        (b'{"text": "' + b"a" * (1 << 21) + b'"}\\n', 300, "300 documents"),
    ],
)
def test_a_bomb(line: bytes, lines: int, said: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    with path.open("wb") as file:
        for _ in range(lines):
            file.write(compressor.compress(line.replace(b"\\n", b"\n")))
        file.write(compressor.flush())
    assert path.stat().st_size < 1 << 20
    ended = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=False
    )
    assert said in ended.stdout, ended.stderr


def test_a_block_of_a_bomb_is_small(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(1 << 28)))
    assert path.stat().st_size < 1 << 16
    with path.open("rb") as file:
        assert max(map(len, decompressed_blocks(path, file, "zstandard"))) <= 32 << 20
