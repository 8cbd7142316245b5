"""Corpora as files: splits stay apart, names are enforced, limits hold."""

import json

import pytest

from salt_jax.errors import InputError
from salt_jax.preparation.own_text import own_text
from salt_jax.preparation.pile import PILE_SUBSETS, pile_files
from salt_jax.preparation.text_files import TextFiles


def _write(path, texts, subset=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "meta": {"pile_set_name": subset} if subset else {}} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _texts(files, split):
    return [document.text for document in files.documents(split)]


def test_a_pattern_a_split(tmp_path):
    _write(tmp_path / "train/1.jsonl", ["b"])
    _write(tmp_path / "train/0.jsonl", ["a", ""])
    validation = _write(tmp_path / "val.jsonl", ["c"])
    files = TextFiles(train=f"{tmp_path}/train/*.jsonl", validation=validation)
    assert files.splits == ("train", "validation")
    assert (_texts(files, "train"), _texts(files, "validation")) == (["a", "b"], ["c"])


def test_held_out_fractions(tmp_path):
    texts = [f"text {number}" for number in range(2000)]
    one = TextFiles(
        train=_write(tmp_path / "all.jsonl", [*texts, *texts]),
        validation_fraction=0.1,
        test_fraction=0.05,
    )
    parts = {split: _texts(one, split) for split in one.splits}
    assert sorted(text for part in parts.values() for text in part) == sorted([*texts, *texts])
    assert not set(parts["train"]) & set(parts["validation"] + parts["test"])
    assert not set(parts["validation"]) & set(parts["test"])
    assert len(parts["validation"]) == pytest.approx(400, abs=80)
    assert len(parts["test"]) == pytest.approx(200, abs=60)
    # Neither the order nor the number of files moves a text to another split.
    _write(tmp_path / "many/0.jsonl", texts[1000:])
    _write(tmp_path / "many/1.jsonl", texts[:1000])
    many = TextFiles(train=f"{tmp_path}/many/*", validation_fraction=0.1, test_fraction=0.05)
    assert set(_texts(many, "test")) == set(parts["test"])


def test_no_split_of_a_tiny_corpus_is_empty(tmp_path):
    fractions = {"validation_fraction": 0.05, "test_fraction": 0.05}
    for seed in range(20):
        texts = [f"text {seed} {number}" for number in range(3)]
        for order in (texts, texts[::-1]):
            path = _write(tmp_path / f"{seed}.jsonl", [*order, *order])
            files = TextFiles(train=path, **fractions)
            parts = {split: set(_texts(files, split)) for split in files.splits}
            assert [len(part) for part in parts.values()] == [1, 1, 1]
            assert set.union(*parts.values()) == set(texts)
            if order is texts:
                first = parts
        assert parts == first
    one = TextFiles(train=_write(tmp_path / "one.jsonl", ["a"]), **fractions)
    assert [len(_texts(one, split)) for split in one.splits] == [1, 0, 0]


def test_a_full_split_is_not_read_to_its_end_to_find_empty_ones(tmp_path):
    path = _write(tmp_path / "a.jsonl", [f"text {number}" for number in range(1000)])
    files = TextFiles(train=path, validation_fraction=0.2, test_fraction=0.2)
    with open(path, "a") as file:
        file.write("{")
    documents = files.documents("train")
    assert next(documents).text.startswith("text ")


def test_a_file_in_two_splits_is_refused(tmp_path):
    path = _write(tmp_path / "a.jsonl", ["a"])
    files = TextFiles(train=f"{tmp_path}/*.jsonl", validation=path)
    with pytest.raises(InputError, match=r"a\.jsonl is both a train and a validation file"):
        files.files("validation")


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"No file matches '.*none/\*'"):
        TextFiles(train=f"{tmp_path}/none/*").files("train")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="No file matches"):
        TextFiles(train=f"{tmp_path}/folder").files("train")


def test_the_piles_names_are_enforced(tmp_path):
    for name in ("train/00", "val", "test"):
        path = _write(tmp_path / f"{name}.jsonl", ["a"], "GitHub" if name == "val" else "Github")
        (tmp_path / f"{name}.jsonl.zst").write_bytes(_zstandard(path))
    files = pile_files(str(tmp_path))
    assert files.subset_names() == PILE_SUBSETS
    assert len(set(PILE_SUBSETS)) == 22
    assert _texts(files, "train") == ["a"]
    with pytest.raises(InputError, match=r"line 1: the subset name 'GitHub'.*nearest: Github"):
        _texts(files, "validation")


def test_the_pile_takes_no_row_without_a_name(tmp_path):
    files = TextFiles(train=_write(tmp_path / "a.jsonl", ["a"]), subsets=PILE_SUBSETS)
    with pytest.raises(InputError, match="no subset name, expected one of the 22"):
        _texts(files, "train")


def _zstandard(path):
    import zstandard

    with open(path, "rb") as file:
        return zstandard.ZstdCompressor().compress(file.read())


def test_free_names_are_found(tmp_path):
    _write(tmp_path / "a.jsonl", ["a"], "mine")
    _write(tmp_path / "b.jsonl", ["b"])
    (tmp_path / "c.rst").write_text("c")
    validation = _write(tmp_path / "val/d.jsonl", ["d"], "another")
    files = TextFiles(train=f"{tmp_path}/*.*", validation=validation, default_subset="rest")
    assert files.subset_names() == ("another", "mine", "rest", "rst")


def test_limits_take_a_sample_of_plain_files(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02}" * 50)
    all_files = TextFiles(train=f"{tmp_path}/*.txt")
    few = TextFiles(train=f"{tmp_path}/*.txt", max_documents=10)
    assert len(_texts(few, "train")) == 10
    assert _texts(few, "train") != _texts(all_files, "train")[:10]
    assert len(_texts(TextFiles(train=f"{tmp_path}/*.txt", max_bytes=350), "train")) == 3


def test_excluded_paths(tmp_path):
    for name in ("keep/a.txt", "leave/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    files = TextFiles(train=f"{tmp_path}/**/*.txt", exclude="*/leave/*")
    assert _texts(files, "train") == ["keep/a.txt"]


def test_sources_have_digests_and_no_folders(tmp_path):
    files = TextFiles(train=_write(tmp_path / "a.jsonl", ["a"]))
    (source,) = files.sources()
    assert (source["file"], source["bytes"]) == ("a.jsonl", (tmp_path / "a.jsonl").stat().st_size)
    assert len(source["digest"]) == 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": ""}, "names no files"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"test_fraction": -0.1}, "test_fraction is -0.1"),
        ({"validation": "b", "validation_fraction": 0.1}, "set one of the two"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing"),
        ({"max_bytes": -1}, "max_bytes is -1"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        TextFiles(**{"train": "a", **settings})


def test_this_machines_own_text(monkeypatch, tmp_path):
    monkeypatch.delenv("SALT_TEXT", raising=False)
    files = own_text(max_bytes=300_000)
    assert sum(len(_texts(files, split)) for split in files.splits) > 10
    assert not any("site-packages" in str(file) for file in files.files("train"))
    (tmp_path / "a.md").write_text("# Mine\n")
    monkeypatch.setenv("SALT_TEXT", f"{tmp_path}/*.md")
    assert own_text(piece_bytes=7).piece_bytes == 7
    assert own_text().piece_bytes == 200
    (tmp_path / "b.md").write_text("x" * 200_000)
    assert own_text().piece_bytes == 1000
    assert own_text(max_bytes=100_000).piece_bytes == 500
    (tmp_path / "b.md").unlink()
    mine = own_text(validation_fraction=0, test_fraction=0)
    assert [(d.text, d.subset) for d in mine.documents("train")] == [("# Mine\n", "md")]


def _pile(folder, *numbers):
    for number in numbers:
        path = _write(folder / f"train/{number}.jsonl", [f"shard {number}"], "Github")
        (folder / f"train/{number}.jsonl.zst").write_bytes(_zstandard(path))
    for name in ("val", "test"):
        path = _write(folder / f"{name}.jsonl", [name], "Github")
        (folder / f"{name}.jsonl.zst").write_bytes(_zstandard(path))
    return pile_files(str(folder))


def test_a_missing_shard_of_the_pile_is_named(tmp_path):
    files = _pile(tmp_path, "00", "01", "04", "03")
    with pytest.raises(InputError, match=r"shard 02 is missing in .*train.*shards up to 04"):
        files.files("train")
    assert len(files.files("validation")) == 1
    _pile(tmp_path, "02")
    assert len(files.files("train")) == 5
    (tmp_path / "train" / "00.jsonl.zst").unlink()
    with pytest.raises(InputError, match="shard 00 is missing"):
        files.files("train")


def test_as_many_shards_as_the_release_has(tmp_path):
    _pile(tmp_path, "00", "01", "02")
    with pytest.raises(InputError, match=r"has 3 shards, expected 4: .*pile_files.train_shards"):
        pile_files(str(tmp_path), train_shards=4).files("train")
    assert len(pile_files(str(tmp_path), train_shards=3).files("train")) == 3


def test_a_number_that_is_there_twice_is_named(tmp_path):
    files = _pile(tmp_path, "00", "01", "1")
    with pytest.raises(InputError, match=r"shard 1 is there twice in .*, as 01 and 1"):
        files.files("train")


def test_a_shard_that_is_there_twice_is_named(tmp_path):
    files = _pile(tmp_path, "00", "01", "02")
    files.refuse_equal_shards()
    (tmp_path / "train" / "01.jsonl.zst").write_bytes(
        (tmp_path / "train" / "00.jsonl.zst").read_bytes()
    )
    with pytest.raises(InputError, match=r"01\.jsonl\.zst has the same content as .*00\.jsonl"):
        files.refuse_equal_shards()
    anything = TextFiles(train=f"{tmp_path}/train/*.zst")
    anything.refuse_equal_shards()  # files of one's own may well be equal


def test_a_name_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "caf\udce9.jsonl").write_text('{"text": "x"}')
    with pytest.raises(InputError, match=r"is not a UTF-8 name, .*: rename it"):
        TextFiles(train=f"{tmp_path}/*.jsonl").files("train")
