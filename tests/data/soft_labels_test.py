"""Stored soft labels: what was written comes back by row id, and nothing else is taken for it."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from salt_jax.data.label_format import LabelFormat, Labels
from salt_jax.data.soft_labels import SoftLabelsWriter, StoredLabels
from salt_jax.errors import InputError
from salt_jax.storage.manifests import write_manifest
from tests.bucket_emulator import BucketEmulator

FORM = LabelFormat(sequence_length=6, vocab_size=300, k=3)
ROWS = 11


def make_labels(rows: int, seed: int = 0) -> Labels:
    rng = np.random.default_rng(seed)
    log_q = -np.sort(rng.exponential(3.0, (rows, 6, 3)), axis=-1)
    return Labels(
        rng.integers(300, size=(rows, 6, 3), dtype=np.int32),
        log_q.astype(np.float16),
        -rng.exponential(3.0, (rows, 6)).astype(np.float16),
        rng.exponential(3.0, (rows, 6)).astype(np.float16),
    )


def part(labels: Labels, rows: Any) -> Labels:
    return Labels(*(array[rows] for array in labels))


def writer(folder: pathlib.Path, **changed: Any) -> SoftLabelsWriter:
    settings: dict[str, Any] = {
        "cache_digest": "c" * 64,
        "split": "train",
        "rows": ROWS,
        "row_ids": None,
        "selection_digest": None,
        "teacher": {"path": "slm", "step": 7, "digest": "t" * 64},
        "temperature": 0.25,
        "form": FORM,
        "shard_rows": 4,
    }
    return SoftLabelsWriter(folder, **{**settings, **changed})


def write_all(making: SoftLabelsWriter, labels: Labels) -> StoredLabels:
    making.begin()
    for shard in making.unfinished():
        halves = np.array_split(np.arange(shard.rows.start, shard.rows.stop), 2)
        batches = [part(labels, rows) for rows in halves]
        making.write(shard, batches)
    return making.complete({"flops": 1e9, "tokens": 66})


def test_labels_by_row_id(tmp_path: pathlib.Path) -> None:
    labels = make_labels(ROWS)
    stored = write_all(writer(tmp_path / "labels"), labels)
    for ids in ([3], [10, 0, 4, 4], list(range(ROWS))):
        for found, expected in zip(stored.read(ids), part(labels, ids), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert {**stored.cost, "seconds": 0} == {"flops": 1e9, "tokens": 66, "seconds": 0}
    assert 0 < stored.cost["seconds"] < 60
    assert stored.manifest["temperature"] == 0.25
    with pytest.raises(InputError, match="Row 11 has no soft labels"):
        stored.read([2, 11])


def test_labels_of_a_selections_rows(tmp_path: pathlib.Path) -> None:
    ids = np.array([1, 5, 6, 9, 30])
    labels = make_labels(5)
    making = writer(tmp_path / "labels", rows=40, row_ids=ids, selection_digest="s" * 64)
    stored = write_all(making, labels)
    assert [list(making.row_ids(shard)) for shard in map(making._shard, (0, 1))] == [
        [1, 5, 6, 9],
        [30],
    ]
    for found, expected in zip(stored.read([30, 5]), part(labels, [4, 1]), strict=True):
        np.testing.assert_array_equal(found, expected)
    for missing in (0, 7, 31):
        with pytest.raises(InputError, match=f"Row {missing} has no soft labels"):
            stored.read([5, missing])


def test_equal_labels_give_equal_bytes(tmp_path: pathlib.Path) -> None:
    labels = make_labels(ROWS)
    first, second = (write_all(writer(tmp_path / name), labels) for name in "ab")
    assert first.digest == second.digest
    assert write_all(writer(tmp_path / "c"), make_labels(ROWS, seed=1)).digest != first.digest


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"temperature": 1.0}, "soft_label_temperature"),
        ({"form": LabelFormat(6, 300, 4)}, "format"),
        ({"selection_digest": "s" * 64}, "selection"),
        ({"teacher": {"path": "slm", "step": 8, "digest": "u" * 64}}, "scorer"),
        ({"cache_digest": "d" * 64}, "cache"),
    ],
)
def test_a_pass_begun_with_something_else_is_refused(
    changed: dict[str, Any], name: str, tmp_path: pathlib.Path
) -> None:
    writer(tmp_path / "labels").begin()
    with pytest.raises(InputError, match=f"was begun with the {name}"):
        writer(tmp_path / "labels", **changed)


def test_damage_is_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "labels"
    stored = write_all(writer(folder, row_ids=np.arange(ROWS) * 2, rows=99), make_labels(ROWS))
    with pytest.raises(InputError, match="belong to the cache cccc"):
        StoredLabels.open(folder, cache_digest="e" * 64)
    shard = next(folder.glob("shards/00001-*.labels"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"00001.*has .* bytes, expected"):
        StoredLabels.open(folder)
    shard.write_bytes(bytes([whole[0] ^ 1, *whole[1:]]))
    damaged = StoredLabels.open(folder)
    damaged.read([0, 10])
    with pytest.raises(InputError, match=r"00001.* is damaged at row 8 .*: copy"):
        damaged.read([0, 10, 8])
    shard.write_bytes(whole)
    (folder / "row_ids.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"row_ids\.npy cannot be read"):
        StoredLabels.open(folder)
    assert json.loads((folder / "manifest.json").read_text())["rows"] == stored.rows == ROWS


@pytest.mark.parametrize("url", ["gs://bucket/labels", "s3://bucket/labels"])
def test_labels_in_a_bucket_are_those_on_disk(
    url: str, tmp_path: pathlib.Path, bucket: BucketEmulator
) -> None:
    pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[url[:2]])
    here = write_all(writer(tmp_path / "labels"), make_labels(ROWS))
    for path in (tmp_path / "labels").rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path / "labels").as_posix()
            bucket.store(f"bucket/labels/{name}", path.read_bytes())
    there = StoredLabels.open(url)
    shards, reads = len(here.manifest["shards"]), bucket.asked["read"]
    for ids in (range(ROWS), [7, 0, 3]):
        for one, same in zip(there.read(list(ids)), here.read(list(ids)), strict=True):
            assert np.array_equal(one, same)
    assert bucket.asked["read"] == reads + shards  # one block each, none of them twice


def test_a_broken_teacher_is_named(tmp_path: pathlib.Path) -> None:
    labels = make_labels(ROWS)
    labels.rest[3, 2] = np.inf
    with pytest.raises(InputError, match=r"slm gives .* not finite for row 3 of train"):
        write_all(writer(tmp_path / "labels"), labels)
    assert not list((tmp_path / "labels").glob("shards/*"))


def test_stored_labels_that_are_not_finite_are_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = make_labels(ROWS)
    labels.log_q[3, 2, 1] = np.nan
    with monkeypatch.context() as careless:
        careless.setattr(Labels, "are_broken", lambda self: np.zeros(len(self.ids), bool))
        stored = write_all(writer(tmp_path / "labels"), labels)
    stored.read([2, 4])
    with pytest.raises(InputError, match="have a value that is not finite for row 3"):
        stored.read([4, 3])


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"row_ids_digest": ""}, r"row_ids.npy"),
        ({"format": {"sequence_length": 1 << 40}}, "its records are too large"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(
    part: dict[str, Any], error: str, tmp_path: pathlib.Path
) -> None:
    stored = write_all(writer(tmp_path), make_labels(ROWS))
    manifest = {**stored.manifest, **part}
    manifest["format"] = {**stored.manifest["format"], **part.get("format", {})}
    write_manifest(tmp_path, manifest)
    with pytest.raises(InputError, match=error):
        StoredLabels.open(tmp_path)
