"""What is in a folder is in that folder: names and links in archives of others lead nowhere."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from salt_jax.data.packed_cache import PackedCache, begin_cache
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.errors import InputError
from salt_jax.storage.manifests import json_digest
from salt_jax.storage.restartable_shards import RestartableShards

LEAVES = "leads out of its folder"


def away(path: pathlib.Path) -> pathlib.Path:
    """Puts a file or folder elsewhere and a link in its place; gives where it is."""
    elsewhere = path.parent.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
    return elsewhere / path.name


@pytest.fixture
def copied(cache: PackedCache, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(cache.path, tmp_path / "in" / "cache")
    return tmp_path / "in" / "cache"


@pytest.mark.parametrize("name", ["../other/rows", "/etc/passwd", "train/../../rows", ""])
def test_a_cache_names_its_own_files(name: str, copied: pathlib.Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = name
    (copied / "manifest.json").write_text(json.dumps(manifest))
    (copied / "COMPLETED").write_text(json_digest(manifest))
    with pytest.raises(InputError, match="expected one inside the folder: copy the cache again"):
        PackedCache.open(copied)


@pytest.mark.parametrize("part", ["manifest.json", "COMPLETED", "vocabulary", "train"])
def test_a_cache_has_its_own_files(part: str, copied: pathlib.Path) -> None:
    away(copied / part)
    with pytest.raises(InputError, match=LEAVES):
        PackedCache.open(copied)


def test_a_cache_is_not_begun_elsewhere(copied: pathlib.Path) -> None:
    elsewhere = away(copied / "vocabulary")
    with pytest.raises(InputError, match=rf"{LEAVES}.*choose another --output_dir"):
        begin_cache(copied)
    assert (elsewhere / "vocabulary.json").exists()
    assert (copied / "COMPLETED").exists()


def test_scores_and_selections_have_their_own_files(
    tmp_path: pathlib.Path, write_scores: Callable[..., RowScores]
) -> None:
    folder = tmp_path / "in" / "scores"
    write_scores(folder, np.arange(9.0), cache_digest="c" * 64)
    shard = away(folder / "shards" / "00001-of-00002.npy")
    with pytest.raises(InputError, match=LEAVES):
        RowScores.open(folder)
    shutil.move(shard, folder / "shards" / "00001-of-00002.npy")
    RowScores.open(folder)
    chosen = tmp_path / "in" / "selection"
    Selection.write(chosen, np.arange(3), cache_digest="c" * 64, split="train", how={})
    away(chosen / "row_ids.npy")
    with pytest.raises(InputError, match=LEAVES):
        Selection.open(chosen)


def test_shards_are_not_written_elsewhere(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "in" / "scores"
    made_from = {"cache": "c"}
    making = RestartableShards(folder, rows=9, shard_rows=3, suffix=".npy", made_from=made_from)
    making.begin()
    away(folder / "shards")
    with pytest.raises(InputError, match=rf"{LEAVES}.*choose another --output_dir"):
        making.begin()


@pytest.mark.parametrize(
    ("rows", "shard_rows"), [(10**18, 1), (9, 0), (0, 5), (9, 10**18), (10, 7)]
)
def test_sizes_that_contradict_one_another(
    rows: int, shard_rows: int, tmp_path: pathlib.Path, write_scores: Callable[..., RowScores]
) -> None:
    """Refused before anything of such a size is made."""
    write_scores(tmp_path, np.arange(9.0), cache_digest="c" * 64)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest = {**manifest, "rows": rows, "shard_rows": shard_rows}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "COMPLETED").write_text(json_digest(manifest))
    with pytest.raises(InputError, match=r"names 2 shards, expected \d+ of .* rows"):
        RowScores.open(tmp_path)


def test_ids_beyond_the_split(tmp_path: pathlib.Path) -> None:
    common = {"cache_digest": "c" * 64, "split": "train", "how": {}}
    selection = Selection.write(tmp_path, np.array([1, 8]), **common)
    selection.require_within(9)
    with pytest.raises(InputError, match="selects row 8 of a split of 8 rows"):
        selection.require_within(8)
