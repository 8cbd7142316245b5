"""Readers: every format gives the same documents; bad files are named with their line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from salt_jax.errors import InputError
from salt_jax.preparation.readers import read_documents
from salt_jax.preparation.reading_log import ReadingLog
from salt_jax.preparation.text_files import TextFiles

TEXTS = ["plain", "zwei\nZeilen\r\nund 🙂", "", "x" * 3000]
ROWS = [
    {"text": text, "meta": {"pile_set_name": name}}
    for text, name in zip(TEXTS, ["Github", "ArXiv", "Github", "Pile-CC"], strict=True)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


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


def test_half_a_surrogate_pair_becomes_a_replacement(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d\\ude42b\\ud83d"}')
    assert [document.text for document in read_documents(tmp_path / "a.jsonl")] == ["a🙂b�"]


BAD_LINES = {
    "not JSON": b'{"text": "a',
    "no `text`": b'{"content": "a"}',
    "is 3, expected a text": b'{"text": 3}',
    "has no `text`": b"[1]",
    "this is not JSON": b'{"text": "\xff"}',
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
    with pytest.raises(InputError, match="is no whole Parquet file"):
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


def test_a_file_that_is_not_there_and_an_unknown_compression(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        list(read_documents(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="decompress it first"):
        list(read_documents(_write(tmp_path / "a.txt.gz")))
