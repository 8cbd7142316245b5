"""Manifests: what is refused, and by what name."""

import json

import pytest

from salt_jax.errors import InputError
from salt_jax.storage.manifests import (
    COMPLETED_FILE,
    MANIFEST_FILE,
    begin_writing,
    json_digest,
    new_manifest,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    parts = {
        **{"cache_digest": "c", "split": "train", "rows": 3, "shard_rows": 3, "k": [10]},
        **{"shards": [], "columns": [], "nan_rows": 0},
        "scorer": {"path": "slm", "step": 1, "digest": "d"},
    }
    write_manifest(tmp_path / "scores", new_manifest("row_scores", **parts))
    return tmp_path / "scores"


def test_round_trip(folder):
    manifest = read_manifest(folder, "row_scores")
    assert (manifest["kind"], manifest["format_version"], manifest["rows"]) == ("row_scores", 3, 3)
    assert (folder / COMPLETED_FILE).read_text().strip() == json_digest(manifest)


def test_the_digest_depends_on_content_alone():
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1})
    assert json_digest({"a": 1}) != json_digest({"a": 2})


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none does not exist.*`salt score`"):
        read_manifest(tmp_path / "none", "row_scores")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match=r"holds no manifest\.json.*salt prepare"):
        read_manifest(tmp_path, "packed_cache")


def test_a_half_written_folder(folder):
    (folder / COMPLETED_FILE).unlink()
    with pytest.raises(InputError, match="half-written"):
        read_manifest(folder, "row_scores")


def test_writing_again_takes_the_old_completion_away(folder):
    begin_writing(folder)
    with pytest.raises(InputError, match="half-written"):
        read_manifest(folder, "row_scores")


def test_another_kind(folder):
    with pytest.raises(InputError, match="holds scores, expected a packed cache"):
        read_manifest(folder, "packed_cache")


def test_another_version(folder):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(InputError, match=r"format version 99.*reads 3"):
        read_manifest(folder, "row_scores")


def test_a_manifest_changed_by_hand(folder):
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace('"rows": 3', '"rows": 4'))
    with pytest.raises(InputError, match="changed after"):
        read_manifest(folder, "row_scores")


def test_broken_json(folder):
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        read_manifest(folder, "row_scores")
