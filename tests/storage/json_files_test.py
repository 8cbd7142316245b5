"""JSON of anyone's is read as what it must be; names in it stay in their folder."""

import json
import pathlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.errors import InputError
from salt_jax.storage import json_files
from salt_jax.storage.json_files import inside, no_link_out, read_json_object, require_shape


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not readable JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe\xff", "not readable JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not readable JSON"),
        (b" " * 2000, "it has more than 1,000 bytes"),
    ],
)
def test_bad_json(
    content: bytes, said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(content) == 2000:
        monkeypatch.setattr(json_files, "_MOST_BYTES", 1000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json .*{said}.*: copy it\.$"):
        read_json_object(tmp_path / "a.json", "copy it")


def test_a_file_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"none cannot be read \(No such file.*\): copy it\."):
        read_json_object(tmp_path / "none", "copy it")


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(), st.text(st.characters(exclude_categories=()))))
def test_texts_can_be_written_again(found: dict[str, str]) -> None:
    read = json_files.parse_json(json.dumps(found))
    for name, text in read.items():
        text.encode()
        is_whole = not any("\ud800" <= c <= "\udfff" for c in found[name])
        assert not is_whole or text == found[name]


SHAPE = {"n": int, "x": float, "t": str, "m": (None, str), "l": [int], "o": {str: {"n": int}}}
GOOD: dict[str, Any] = {"n": 0, "x": 1, "t": "", "m": None, "l": [], "o": {"a": {"n": 1, "b": 2}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"m": "text", "x": -1.5, "l": [1, 2], "more": {}}, ""),
        ({"n": -1}, "n is -1, expected a whole number of 0 or more"),
        ({"n": 2**63}, "n is 9223372036854775808, expected a whole"),
        ({"n": True}, "n is true, expected a whole"),
        ({"n": 1.0}, "n is 1.0, expected a whole"),
        ({"x": "1"}, 'x is "1", expected a number'),
        ({"x": False}, "x is false, expected a number"),
        ({"t": None}, "t is null, expected a string"),
        ({"m": 1}, "m is 1, expected a string"),
        ({"l": {}}, "l is {}, expected a list"),
        ({"l": [0, "a"]}, r'l\[1\] is "a", expected a whole'),
        ({"o": []}, r"o is \[\], expected an object"),
        ({"o": {"a": {}}}, "o.a has no n"),
        ({"o": {"a": {"n": ["a\n" * 99]}}}, r"o.a.n is \[\"a\\n.*…, expected a whole"),
    ],
)
def test_shapes(changes: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    file, found = tmp_path / "a.json", {**GOOD, **changes}
    if said:
        with pytest.raises(InputError, match=rf"a\.json: {said}.*: copy it\.$"):
            require_shape(file, found, SHAPE, "copy it")
    else:
        require_shape(file, found, SHAPE, "copy it")


@pytest.mark.parametrize("name", SHAPE)
def test_what_is_missing_is_named(name: str, tmp_path: pathlib.Path) -> None:
    rest = {each: value for each, value in GOOD.items() if each != name}
    with pytest.raises(InputError, match=f": it has no {name}: copy it"):
        require_shape(tmp_path / "a.json", rest, SHAPE, "copy it")


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "../b", "a/../../b", "a/..", "a\0b", "a\\b", "//a"]
)
def test_names_that_lead_out(name: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"expected one inside the folder: copy it\."):
        inside(tmp_path, name, "copy it")


def test_names_that_stay(tmp_path: pathlib.Path) -> None:
    for name in ("a", "train/rows-00000", "a..b", ".a"):
        assert inside(tmp_path, name, "copy it") == tmp_path / name


def test_links(tmp_path: pathlib.Path) -> None:
    """Those inside of the folder are as good as files, whatever the folder itself is called."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    for each in (folder, other):
        each.mkdir()
        (each / "file").touch()
    (folder / "good").symlink_to("file")
    (tmp_path / "alias").symlink_to("folder")
    for path in (folder, tmp_path / "alias"):
        assert inside(path, "good", "copy it") == path / "good"
    (folder / "out").symlink_to("../other/file")
    (folder / "part").symlink_to(other)
    (folder / "circle").symlink_to("circle")
    for name in ("out", "part/file", "part"):
        with pytest.raises(InputError, match=r"leads out of its folder, to .*other.*by a link"):
            inside(folder, name, "copy it")
    with pytest.raises(InputError, match="circle"):
        no_link_out(folder, folder / "circle", "copy it")
