"""Folders that anyone may have made: caches, scores, selections, soft labels, vocabularies.

Whatever their manifest says (its digest in COMPLETED right, as whoever made it would see to) and
whatever bytes their files have: what they hold, or one sentence.
"""

import copy
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.data.features import make_row
from salt_jax.data.label_format import LabelFormat, Labels
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.data.soft_labels import SoftLabelsWriter, StoredLabels
from salt_jax.data.vocabularies import load_vocabulary
from salt_jax.errors import InputError
from salt_jax.storage.manifests import file_digest, json_digest

fuzzed = settings(
    max_examples=int(os.environ.get("SALT_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

KINDS = ("cache", "scores", "selection", "labels")


def use_cache(folder: pathlib.Path) -> None:
    cache = PackedCache.open(folder)
    for name in cache.split_names:
        rows = cache.split(name)
        for row in rows.__getitems__(range(len(rows))):
            assert row["targets"].shape == (cache.sequence_length,)
            assert row["targets"].max() < cache.vocabulary_size
    cache.verify()


def use_scores(folder: pathlib.Path) -> None:
    scores = RowScores.open(folder, cache_digest="c" * 64)
    assert scores.cost is None or scores.cost["flops"] is not None
    for name, _ in scores.manifest["columns"]:
        column = scores.column(name)
        assert len(column[:]) == len(column[np.arange(scores.rows)]) == scores.rows


def use_selection(folder: pathlib.Path) -> None:
    selection = Selection.open(folder, cache_digest="c" * 64)
    assert np.all(np.diff(selection.row_ids, prepend=-1) > 0)


def use_labels(folder: pathlib.Path) -> None:
    stored = StoredLabels.open(folder, cache_digest="c" * 64)
    assert stored.cost["seconds"] >= 0
    labels = stored.read([0, 2])
    assert labels.ids.shape == (2, stored.format.sequence_length, stored.format.k)
    stored.require_fit(temperature=0.5, k=2, selection_digest=None)


USE = dict(zip(KINDS, (use_cache, use_scores, use_selection, use_labels), strict=True))


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    cache: PackedCache,
    write_scores: Callable[..., RowScores],
) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("folders")
    shutil.copytree(cache.path, root / "cache")
    cost = {"flops": 1.0, "tokens": 9}
    scores = write_scores(root / "scores", np.arange(9.0), cache_digest="c" * 64, cost=cost)
    common = {"cache_digest": "c" * 64, "split": "train"}
    ids = np.array([0, 2, 5])
    Selection.write(root / "selection", ids, how={"rule": "x"}, scores=scores, **common)
    making = SoftLabelsWriter(
        root / "labels",
        rows=9,
        row_ids=ids,
        selection_digest=None,
        teacher={"path": "slm", "step": 1, "digest": "d"},
        temperature=0.5,
        form=LabelFormat(sequence_length=4, vocab_size=300, k=2),
        shard_rows=2,
        **common,
    )
    making.begin()
    for shard in making.unfinished():
        n = len(shard.rows)
        half = np.full((n, 4), -1.0, np.float16)
        labels = Labels(np.ones((n, 4, 2), np.int32), np.repeat(half[..., None], 2, 2), half, half)
        making.write(shard, [labels])
    making.complete(cost)
    for kind, use in USE.items():
        use(root / kind)
    return {kind: root / kind for kind in KINDS}


ODD = st.sampled_from(
    [
        *("", ".", "..", "../cache", "/etc/passwd", "a\0b", "train\\x", "|O", "<f4", "a\nb"),
        *("\ud800", "train/../../x", "\x1b[31m", None, [], {}, True),
        *(0, -1, 2**31, 2**63 - 1, 2**64, 1e308),
    ]
)
ANY = st.recursive(
    ODD | st.text(max_size=5) | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def changed(data: st.DataObject, value: Any) -> Any:
    """The value with something else somewhere in it, in the place of what was there."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 7)):
        value = copy.copy(value)
        places = sorted(value) if isinstance(value, dict) else range(len(value))
        place = data.draw(st.sampled_from(list(places)))
        how = data.draw(st.integers(0, 9))
        if how == 0:
            del value[place]
        elif how == 1 and isinstance(value, dict):
            value[data.draw(st.text(max_size=3))] = value.pop(place)
        else:
            value[place] = changed(data, value[place])
        return value
    if isinstance(value, int) and data.draw(st.booleans()):
        return value + data.draw(st.integers(-9, 9))
    return data.draw(ANY)


@pytest.mark.parametrize("kind", KINDS)
@fuzzed
@given(data=st.data())
def test_manifests(kind: str, data: st.DataObject, folders: dict[str, pathlib.Path]) -> None:
    folder = folders[kind]
    files = [folder / name for name in ("manifest.json", "COMPLETED")]
    before = [file.read_bytes() for file in files]
    manifest = json.loads(before[0])
    for _ in range(data.draw(st.integers(1, 3))):
        manifest = changed(data, manifest)
    try:
        files[0].write_text(json.dumps(manifest))
        files[1].write_text(json_digest(manifest))
        _only_input_errors(USE[kind], folder)
    finally:
        for file, content in zip(files, before, strict=True):
            file.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
@fuzzed
@given(data=st.data())
def test_bytes(kind: str, data: st.DataObject, folders: dict[str, pathlib.Path]) -> None:
    """A file with bytes changed, cut short, grown, or of something else altogether."""
    folder = folders[kind]
    known = sorted(file for file in folder.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(known))
    before = file.read_bytes()
    try:
        file.write_bytes(_damaged(data, before))
        _only_input_errors(USE[kind], folder)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("kind", ["scores", "selection", "labels"])
@fuzzed
@given(data=st.data())
def test_bytes_with_their_digest(
    kind: str, data: st.DataObject, folders: dict[str, pathlib.Path]
) -> None:
    """Of whoever changed the digests and sizes in the manifest, too."""
    folder = folders[kind]
    known = sorted(folder.glob("shards/*.[ln]*")) + sorted(folder.glob("*.npy"))
    file = data.draw(st.sampled_from(known))
    files = [file, folder / "manifest.json", folder / "COMPLETED"]
    before = [each.read_bytes() for each in files]
    old, manifest = file_digest(file), json.loads(before[1])
    file.write_bytes(_damaged(data, before[0]))
    try:
        for shard in manifest.get("shards", []):
            if shard["digest"] == old:
                shard["bytes"] = file.stat().st_size
        text = json.dumps(manifest).replace(old, file_digest(file))
        files[1].write_text(text)
        files[2].write_text(json_digest(json.loads(text)))
        _only_input_errors(USE[kind], folder)
    finally:
        for each, content in zip(files, before, strict=True):
            each.write_bytes(content)


@fuzzed
@given(data=st.data())
def test_vocabularies(data: st.DataObject, folders: dict[str, pathlib.Path]) -> None:
    file = folders["cache"] / "vocabulary" / "vocabulary.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(changed(data, json.loads(before))))
        _only_input_errors(load_vocabulary, folders["cache"])
    finally:
        file.write_text(before)


@fuzzed
@given(data=st.data())
def test_records(data: st.DataObject) -> None:
    """Of a cache's rows, below the check sums of the file that they are in."""
    form = RecordFormat(sequence_length=16, vocabulary_size=300)
    segments_L = np.repeat([1, 2, 0], [9, 5, 2])
    row = make_row(np.arange(16) + 280, np.ones(16), segments_L)
    record = _damaged(data, form.encode(row | {"targets": row["targets"] % 300}))
    try:
        read = form.decode(record, 3)
    except InputError:
        return
    assert all(read[name].shape == row[name].shape for name in row)
    assert read["targets"].max() < 300
    assert read["segment_ids"].max() <= 16


def _damaged(data: st.DataObject, before: bytes) -> bytes:
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.integers(0, 4))
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if how == 0 or not content:
            content = bytearray(data.draw(st.binary(max_size=30)))
        elif how == 1:
            del content[place:]
        elif how == 2:
            content[place:place] = data.draw(st.binary(max_size=9))
        else:
            content[place] ^= data.draw(st.integers(1, 255))
    return bytes(content)


def _only_input_errors(use: Callable[[pathlib.Path], Any], folder: pathlib.Path) -> None:
    try:
        use(folder)
    except InputError as error:
        assert len(str(error)) < 2000  # noqa: PT017 (it may as well be used)
