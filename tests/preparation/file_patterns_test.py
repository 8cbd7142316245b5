"""Patterns find files by names of any signs, and each file once."""

import glob
import pathlib
import random

import pytest

from salt_jax.errors import InputError
from salt_jax.preparation.file_patterns import names_of
from salt_jax.preparation.text_files import TextFiles


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str) -> None:
    for name in names:
        path = pathlib.Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"in {name}\n")


def link(name: str, to: str) -> None:
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).symlink_to(to)


def found(*patterns: str, **settings: str) -> list[str]:
    return [str(file) for file in TextFiles(train=patterns, **settings).files("train")]


def test_without_links_they_find_what_glob_finds():
    generator = random.Random(0)
    names = ["a", "b.txt", ".c", "[d]", "e f"]
    for _ in range(60):
        path = "/".join(generator.choices(names, k=generator.randrange(1, 4)))
        if not pathlib.Path(path).exists():
            parents = pathlib.Path(path).parents
            if not any(parent.is_file() for parent in parents):
                make(path)
    patterns = ["*", "**", "**/*", "*/**/b*", "**/.c", "**/.*", "./*/a", "a/**", "**/a/**/*.txt"]
    for pattern in [*patterns, "*/", "a//*", "?", "[ab]*", "nothing", f"{pathlib.Path.cwd()}/**/a"]:
        files = filter(
            lambda name: pathlib.Path(name).is_file(), glob.glob(pattern, recursive=True)
        )
        expected = {str(pathlib.Path(name)) for name in files}
        assert {str(pathlib.Path(name)) for name in names_of(pattern, {})} == expected, pattern


def test_signs_that_are_part_of_a_name():
    names = ["corpus [v2]/a.jsonl", "corpus [v2]/in/b[1].jsonl", "base[1].jsonl", "what?.jsonl"]
    make(*names, "corpus v/other.jsonl", "base1.jsonl", "what1.jsonl", "all*.jsonl", "all.jsonl")
    assert found("corpus [v2]/*.jsonl") == names[:1]
    assert found("corpus [v2]/**/*.jsonl") == names[:2]
    assert found("corpus [v2]/in/b[1].jsonl") == names[1:2]
    assert found("*/in/b[1].jsonl") == names[1:2]
    for name in ("base[1].jsonl", "what?.jsonl", "all*.jsonl"):
        assert found(name) == [name]
    assert found("base[0-9].jsonl") == ["base1.jsonl"]
    assert found("*.jsonl", exclude="base[1].jsonl")[:3] == [
        "all*.jsonl",
        "all.jsonl",
        "what1.jsonl",
    ]


def test_links_do_not_repeat_files(capsys):
    make("loop/v1/a.jsonl", "other/b.jsonl")
    link("loop/v1/self", ".")
    link("loop/v1/again", ".")  # with two, glob would find 2 ** 40 names
    link("loop/up", "..")
    link("loop/0 first", "v1")
    link("loop/0.jsonl", "v1/a.jsonl")
    link("loop/elsewhere", "../other")
    link("loop/broken.jsonl", "nowhere")
    assert found("loop/**/*.jsonl") == ["loop/elsewhere/b.jsonl", "loop/v1/a.jsonl"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "names left out: 6, such as loop/0 first, which is loop/v1" in said
    absolute = f"{pathlib.Path.cwd()}/loop/v1/a.jsonl"
    assert found("loop/v1/a.jsonl", absolute) == [absolute]
    link("blobs", "loop/v1/a.jsonl")
    link("named.jsonl", "blobs")
    assert found("named.jsonl") == ["named.jsonl"]  # its target's name would say nothing


def test_no_links_and_nothing_is_said(capsys):
    make("corpus/a.txt", "corpus/b/c.txt", "docs/x")
    link("corpus/docs", "../docs")
    link("corpus/docs again", "../docs")
    assert len(found("corpus/**/*.txt", "corpus/a.txt")) == 2
    assert not capsys.readouterr().out


def test_one_file_in_two_splits_by_two_names():
    make("train/a.jsonl")
    link("held", "train")
    for name in ("held/a.jsonl", f"{pathlib.Path.cwd()}/train/a.jsonl"):
        files = TextFiles(train="train/*", validation=name)
        with pytest.raises(InputError, match=r"is both a train \(as train/a.jsonl\) and a valid"):
            files.files("validation")


def test_a_shard_that_is_a_link_to_another_is_told():
    make("0.jsonl")
    link("1.jsonl", "0.jsonl")
    files = TextFiles(train="*.jsonl", train_shards=0)
    with pytest.raises(InputError, match=r"1\.jsonl has the same content as 0\.jsonl"):
        files.refuse_equal_shards()


def test_what_is_no_text_is_refused_before_anything_is_read():
    make("a.jsonl", "b.zip")
    with pytest.raises(InputError, match=r"^b\.zip is an archive"):
        found("*")
    assert found("*", exclude="*.zip") == ["a.jsonl"]
