"""Readers: every format gives the same documents; bad files are named with their line."""

import array
import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from salt_jax.data import decompression
from salt_jax.errors import InputError
from salt_jax.huggingface.chat_templates import ChatTemplate
from salt_jax.preparation.readers import read_documents
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.templates import Template
from salt_jax.preparation.text_files import TextFiles

TEXTS = ["plain", "zwei\nZeilen\r\nund 🙂", "", "x" * 3000]
ROWS = [
    {"text": text, "meta": {"pile_set_name": name}}
    for text, name in zip(TEXTS, ["Github", "ArXiv", "Github", "Pile-CC"], strict=True)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zstd": zstandard.ZstdCompressor().compress,
}


def _write(path, data=LINES):
    if path.suffix.lower() == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    elif path.name.endswith(".gz"):
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL.ZST"])
def test_json_lines(tmp_path, name):
    documents = list(read_documents(_write(tmp_path / name)))
    assert [(document.text, document.subset) for document in documents] == [
        (row["text"], row["meta"]["pile_set_name"]) for row in ROWS
    ]
    assert documents[1].place.endswith("line 2")


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    assert [(d.text, d.subset) for d in read_documents(path)] == [
        (row["text"], row["meta"]["pile_set_name"]) for row in ROWS
    ]


@pytest.mark.parametrize("list_type", [pyarrow.list_, pyarrow.large_list])
def test_conversations_of_parquet(tmp_path, list_type):
    chat = ChatTemplate("{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}")
    template = Template("{messages}", "{messages}", chat=chat)
    said = [("user", "Salt?"), ("tool", None), ("assistant", "Yes\xff")]
    messages = [{"role": role, "content": content} for role, content in said]
    fields = [("role", pyarrow.string()), ("content", pyarrow.large_string())]
    rows = [messages[::2], messages]
    column = pyarrow.array(rows, list_type(pyarrow.struct(fields)))
    pyarrow.parquet.write_table(pyarrow.table({"messages": column[1:]}), tmp_path / "a.parquet")
    (document,) = read_documents(tmp_path / "a.parquet", template=template)
    assert document.prompt == "<user>Salt?<tool>"
    assert document.text == "<assistant>Yes\xff"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_plain_subset_name_or_none(tmp_path, kind):
    rows = [{"text": "a", "subset": "mine"}, {"text": "b", "subset": None}]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert [document.subset for document in read_documents(path)] == ["mine", ""]


def test_plain_text_is_one_document_named_by_its_suffix(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n\xff")
    (document,) = read_documents(tmp_path / "a.py")
    assert (document.text, document.subset) == ("x = 1\r\n�", "py")


def test_plain_text_in_pieces(tmp_path):
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "notes").write_text(text)
    pieces = [document.text for document in read_documents(tmp_path / "notes", piece_bytes=100)]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and len(piece) < 120 for piece in pieces)


def test_lines_longer_than_a_block_and_several_zstandard_frames(tmp_path):
    rows = [{"text": "é" * 3_000_000}, {"text": "b"}]
    frames = [zstandard.ZstdCompressor().compress(json.dumps(r).encode() + b"\n") for r in rows]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [d.text for d in read_documents(tmp_path / "a.jsonl.zst")] == [r["text"] for r in rows]


def test_bytes_that_are_no_utf_8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\xffy", "subset": "\xff"}\n')
    assert [d[:2] for d in read_documents(tmp_path / "a.jsonl")] == [("x\ufffdy", "\ufffd")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json"):
        text = b"text" if name == "a.txt" else b'{"text": "text"}'
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text)
        assert [document.text for document in read_documents(tmp_path / name)] == ["text"]


def test_half_a_surrogate_pair_becomes_a_replacement(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d\\ude42b\\ud83d"}')
    assert [document.text for document in read_documents(tmp_path / "a.jsonl")] == ["a🙂b�"]


BAD_LINES = {
    "not JSON": b'{"text": "a',
    "no `text`": b'{"content": "a"}',
    "is 3, expected a string": b'{"text": 3}',
    "is a list, expected an object": b"[1]",
    "this is not JSON": b'{"text": "\x01"}',
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_broken_line_is_named_or_skipped_and_counted(tmp_path, what):
    path = _write(tmp_path / "a.jsonl.zst", LINES + b"\n" + BAD_LINES[what] + b"\n" + LINES)
    with pytest.raises(InputError, match=rf"a\.jsonl\.zst, line 6: .*{what}.*skip_broken_lines"):
        list(read_documents(path))
    log = ReadingLog()
    for _ in range(2):  # a second reading doesn't count twice
        texts = [d.text for d in read_documents(path, skip_broken_lines=True, log=log)]
        assert texts == TEXTS + TEXTS
        assert log.broken_lines == {str(path): 1}


def test_broken_lines_count_though_the_reader_stops_inside_the_file(tmp_path):
    path = _write(tmp_path / "a.jsonl", b"{\n" + LINES + b"{\n" + LINES)
    log = ReadingLog()
    documents = read_documents(path, skip_broken_lines=True, log=log)
    next(documents)
    assert log.broken_lines == {str(path): 1}
    files = TextFiles(train=str(path), max_documents=5, skip_broken_lines=True)
    log = ReadingLog()
    assert len(list(files.documents("train", log))) == 5
    assert log.broken_lines == {str(path): 2}


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_a_file_cut_short_is_named_whatever_is_skipped(tmp_path, name):
    path = _write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=rf"{name} is cut short or damaged"):
        list(read_documents(path, skip_broken_lines=True))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else altogether")
    with pytest.raises(InputError, match=name):
        list(read_documents(tmp_path / name))


def test_a_damaged_page_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"row {i} " * 50} for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a complete Parquet file"):
        list(read_documents(path))


def test_parquet_without_text(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    with pytest.raises(InputError, match="no column `text`, it has content"):
        list(read_documents(path))


def test_parquet_with_an_empty_row(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2: this row has no `text`"):
        list(read_documents(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        list(read_documents(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("piece_bytes", [0, 100])
def test_compressed_plain_text(tmp_path, compression, piece_bytes):
    text = "".join(f"Zeile {number} 🙂\n" for number in range(100))
    packed = COMPRESSIONS[compression](codecs.BOM_UTF8 + text.encode())
    (tmp_path / f"a.py{compression}").write_bytes(packed)
    documents = list(read_documents(tmp_path / f"a.py{compression}", piece_bytes=piece_bytes))
    assert "".join(document.text for document in documents) == text
    assert {document.subset for document in documents} == {"py"}
    assert (len(documents) > 1) == bool(piece_bytes)


@pytest.mark.parametrize("piece_bytes", [1, 5, 64, 1000])
def test_pieces_are_whole_lines_of_more_than_their_bytes(tmp_path, piece_bytes, monkeypatch):
    """As `readlines(piece_bytes)` gives them: what is held out hangs on it."""
    generator = random.Random(0)
    text = b"".join(b"x" * generator.randrange(90) + b"\n" for _ in range(200)) + b"end"
    (tmp_path / "a.txt").write_bytes(text)
    file = io.BufferedReader(io.BytesIO(text))
    expected = [b"".join(lines) for lines in iter(lambda: file.readlines(piece_bytes), [])]
    for block_bytes in (1, 7, 1 << 20):
        monkeypatch.setattr(decompression, "BLOCK_BYTES", block_bytes)
        pieces = read_documents(tmp_path / "a.txt", piece_bytes=piece_bytes)
        assert [piece.text.encode() for piece in pieces] == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"text\n" * 900 + b"\0", "holds NUL bytes"),
        ("a.txt", "text".encode("utf-16"), "holds text in UTF-16"),
        ("a.txt", gzip.compress(b"text", mtime=0), "is compressed with gzip"),
        ("a.txt.gz", gzip.compress(b"PAR1\x15\4", mtime=0), "once decompressed, holds a Parquet"),
        ("part-00000", LINES, "holds rows of JSON"),
        ("part-00000.gz", gzip.compress(LINES, mtime=0), "holds rows of JSON"),
        ("a.zip", b"", "is an archive"),
        ("a.tar.xz", b"", "is an archive"),
    ],
)
def test_what_is_no_plain_text(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name},? .*{said}"):
        list(read_documents(tmp_path / name))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = _write(tmp_path / "a.txt.gz")
    path.rename(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match=r"needs the library zstandard.*salt_jax\[prepare\]"):
        list(read_documents(tmp_path / "a.jsonl.zst"))


def _not_utf_8(kind):
    """["a", "x\\xffy"], as a writer that doesn't look gives it."""
    offsets = array.array("q" if kind == pyarrow.large_string() else "i", [0, 1, 4]).tobytes()
    return pyarrow.Array.from_buffers(
        kind, 2, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"ax\xffy")]
    )


_VIEW = _not_utf_8(pyarrow.binary()).cast(pyarrow.binary_view())
TEXT_COLUMNS = {
    "string": _not_utf_8(pyarrow.string()),
    "large_string": _not_utf_8(pyarrow.large_string()),
    "binary": _not_utf_8(pyarrow.binary()),
    "binary_view": _VIEW,
    "dictionary": pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1], pyarrow.int32()), _not_utf_8(pyarrow.string())
    ),
    "string_view": pyarrow.Array.from_buffers(pyarrow.string_view(), 2, _VIEW.buffers()),
}


@pytest.mark.parametrize("kind", TEXT_COLUMNS)
def test_bytes_that_are_no_utf_8_in_parquet(tmp_path, kind):
    """In text, names and what isn't read at all, whatever the column's type."""
    texts = TEXT_COLUMNS[kind]
    meta = pyarrow.StructArray.from_arrays([texts, texts], ["pile_set_name", "url"])
    for names in ({"subset": texts}, {"meta": meta}, {"meta": meta, "subset": texts}):
        table = pyarrow.table({"text": texts, **names, "url": texts})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        documents = list(read_documents(tmp_path / "a.parquet"))
        assert [(document.text, document.subset) for document in documents] == [
            ("a", "a"),
            ("x\ufffdy", "x\ufffdy"),
        ]


def test_a_dictionary_that_arrow_does_not_read(tmp_path):
    column = pyarrow.DictionaryArray.from_arrays([0, 1], _not_utf_8(pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="text that is not UTF-8 after row 0"):
        list(read_documents(tmp_path / "a.parquet"))


def test_columns_that_are_no_text(tmp_path):
    bad = _not_utf_8(pyarrow.string())
    for column in (pyarrow.ListArray.from_arrays([0, 1, 2], bad), pyarrow.array([1, 2])):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"row 1: .*expected a string"):
            list(read_documents(tmp_path / "a.parquet"))
    meta = pyarrow.array([None, {"n": 1}])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "meta": meta}), tmp_path / "b.parquet"
    )
    assert [document.subset for document in read_documents(tmp_path / "b.parquet")] == ["", ""]


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        (
            "a.jsonl",
            b'[{"text": "x"}]',
            r"line 1: this row is a list, .*one array \.json",
        ),
        ("a.jsonl", b'"x"', "line 1: this row is a str, expected an object"),
        ("a.txt", b'\n {"text": "x"}\n', r"rows of JSON, .* name it ….jsonl"),
        ("a.txt", b'[\n {"text": "x",\n "n": 1}]', r"an array of JSON, .* name it ….json \("),
        ("a.jsonl.gz", '{"text": "ü"}'.encode(), "not compressed with gzip, as its name says: dr"),
        ("a.txt.zst", b"text", r"not compressed with zstandard, .*: drop \.zst from its name"),
    ],
)
def test_rows_that_a_name_does_not_say(tmp_path, name, content, answer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=answer):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("text", ["[INST] x", '{"x": 1}', "[[1]]", "[{", '[{"x": "text"}]'])
def test_text_that_only_looks_like_rows_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert [document.text for document in read_documents(tmp_path / "a.txt")] == [text]
