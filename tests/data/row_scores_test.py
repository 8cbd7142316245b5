"""Scores and selections: they name their cache, and another cache is refused."""

import dataclasses
import hashlib
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.data.row_scores import (
    SUBSET,
    TARGETS_HASH,
    RowScores,
    RowScoresWriter,
    Selection,
    targets_hash,
)
from salt_jax.distill.scores import ScoreConfig
from salt_jax.errors import InputError
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.manifests import json_digest

SCORES = [1.5, -np.inf, 3.0, 2.0, np.nan]
SCORER = {"path": "slm", "step": 100, "digest": "d" * 64}


@pytest.fixture
def scores(tmp_path, write_scores):
    def write(folder="scores", values=SCORES, **changes):
        settings = {"cache_digest": "a" * 64, "shard_rows": 2, **changes}
        return write_scores(tmp_path / folder, values, **settings)

    return write


def _cost(seconds):
    return {"flops": 1e12, "tokens": 4096, "seconds": seconds}


def test_scores_come_back(scores, tmp_path):
    written = scores(ks=(5, 10))
    opened = RowScores.open(tmp_path / "scores", cache_digest="a" * 64)
    values = opened.column("median_drop_k5")[:]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array(SCORES, np.float32))
    assert opened.manifest["scorer"] == SCORER
    assert (opened.manifest["rows"], opened.rows, opened.manifest["k"]) == (5, 5, [5, 10])
    assert opened.manifest["nan_rows"] == 1
    assert opened.digest == written.digest != scores("other", split="test").digest


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_where_none_is_known(scores, bad):
    made = scores(values=[1.0, 2.0, 3.0, bad, -np.inf])
    assert made.manifest["nan_rows"] == 1
    assert np.isnan(made.column("median_drop_k10")[:]).sum() == np.isnan(bad)
    unknown = dataclasses.replace(made, manifest={**made.manifest, "nan_rows": 0})
    assert unknown.column("median_drop_k10")[np.array([4, 0])].tolist() == [-np.inf, 1.0]
    for rows in (slice(2, 5), np.array([1, 3])):
        with pytest.raises(InputError, match=rf"median_drop_k10 of {bad} for row 3, which is not"):
            unknown.column("median_drop_k10")[rows]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_column_reads_like_an_array(write_scores, tmp_path_factory, data):
    rows, shard_rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    values = np.random.default_rng(rows).normal(size=rows).astype(np.float32)
    subsets = np.arange(rows, dtype=np.uint16)
    hashes = np.arange(rows, dtype=np.uint64) << np.uint64(40)
    written = write_scores(
        tmp_path_factory.mktemp("scores"),
        values,
        cache_digest="a" * 64,
        shard_rows=shard_rows,
        columns={"subset": subsets, "targets_hash": hashes},
    )
    first = data.draw(st.integers(0, rows))
    part = slice(first, data.draw(st.integers(first, rows + 3)))
    ids = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), np.int64)
    for name, whole in (("mean_k10", values), ("subset", subsets), ("targets_hash", hashes)):
        column = written.column(name)
        assert len(column) == rows
        for taken in (part, ids, slice(None)):
            np.testing.assert_array_equal(column[taken], whole[taken])
            assert column[taken].dtype == whole.dtype


def test_a_shard_opens_as_its_documentation_says(scores):
    written = scores()
    shard = np.load(written.path / "shards" / "00001-of-00003.npy", mmap_mode="r")
    np.testing.assert_array_equal(shard["mean_k10"], written.column("mean_k10")[2:4])


def test_hundreds_of_columns_are_read(scores):
    written = scores(ks=tuple(range(1, 151)))
    assert written.column("median_drop_k150")[0:1] == SCORES[0]


def test_a_score_may_have_any_name(tmp_path):
    writer = RowScoresWriter(
        tmp_path / "scores",
        cache_digest="a" * 64,
        split="train",
        rows=1,
        scorer=SCORER,
        ks=(),
        columns=(),
        own_columns=("ω",),
        shard_rows=1,
    )
    writer.begin()
    [shard] = writer.unfinished()
    values = {"ω": np.float32([2]), SUBSET: np.uint16([0]), TARGETS_HASH: np.uint64([7])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write(shard, values, {"seconds": 1.0, "workers": 1})
    assert writer.complete().column("ω")[0:1] == [2]


def test_scores_of_format_version_2_are_read(scores):
    written = scores()
    values = {name: written.column(name)[:] for name, _ in written.manifest["columns"]}
    manifest = {**written.manifest, "format_version": 2}
    for info, path in zip(
        manifest["shards"], sorted(written.path.glob("shards/*.npy")), strict=True
    ):
        columns = np.load(path)
        data = b"".join(columns[name].tobytes() for name, _ in manifest["columns"])
        path.with_suffix(".columns").write_bytes(data)
        path.unlink()
        info |= {"bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}
    write_text(written.path / "manifest.json", json.dumps(manifest))
    write_text(written.path / "COMPLETED", json_digest(manifest))
    opened = RowScores.open(written.path)
    for name, expected in values.items():
        np.testing.assert_array_equal(opened.column(name)[1:5], expected[1:5])
        np.testing.assert_array_equal(opened.column(name)[np.array([4, 0])], expected[[4, 0]])
    begun = json.loads((written.path / "pass.json").read_text())
    (written.path / "pass.json").write_text(json.dumps({**begun, "suffix": ".columns"}))
    with pytest.raises(InputError, match=r"another version of salt_jax, .* choose another --out"):
        scores()


def test_too_few_learnable_tokens_are_no_score(scores):
    shares = np.array([0.5, 0.5, 0.25, 0.24999, 1.0], np.float32)
    written = scores(columns={"learnable_k10": shares})
    score = ScoreConfig(10, min_learnable_fraction=0.25)
    chosen = written.scores(score.column, score.learnable_column, score.min_learnable_fraction)
    expected = np.array([1.5, -np.inf, 3.0, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(chosen[:], expected)
    np.testing.assert_array_equal(chosen[np.array([3, 0])], expected[[3, 0]])
    assert len(chosen) == 5


def test_the_digest_tells_scores_apart(scores):
    assert scores().digest != scores("other", [1.5, -np.inf, 3.0, 2.5, np.nan]).digest


def test_the_digest_is_of_the_scores_and_not_of_what_they_cost(scores):
    made = [scores(str(flops), cost={"flops": flops, "tokens": 9}) for flops in (1.0, 2.0)]
    assert made[0].digest == made[1].digest == scores().digest
    assert [one.cost["flops"] for one in made] == [1.0, 2.0]


def test_seconds_are_those_of_workers_side_by_side(tmp_path, write_scores, monkeypatch):
    from salt_jax.data import row_scores

    write = row_scores.RowScoresWriter.write
    monkeypatch.setattr(
        row_scores.RowScoresWriter,
        "write",
        lambda self, shard, columns, _: write(self, shard, columns, {"seconds": 8, "workers": 4}),
    )
    cost = {"flops": 1.0, "tokens": 9}
    made = write_scores(tmp_path, SCORES, cache_digest="a", shard_rows=2, cost=cost)
    assert made.cost == {**cost, "seconds": 3 * 8 / 4}


def test_a_selection_carries_what_its_scores_cost(scores, tmp_path):
    common = {"cache_digest": "a" * 64, "split": "train", "how": {}}

    def selected(scores):
        return Selection.write(tmp_path / "selection", np.array([2, 3]), scores=scores, **common)

    known = selected(scores("known", cost={"flops": 1e12, "tokens": 4096}))
    assert known.manifest["scoring_cost"] == _cost(3.0)
    unknown = selected(scores("unknown"))
    assert unknown.manifest["scoring_cost"] is None
    assert unknown.digest == known.digest
    at_random = selected(None).manifest["scoring_cost"]
    assert at_random == {"flops": 0.0, "tokens": 0, "seconds": 0.0}


def test_a_selection_carries_where_it_came_from(scores, tmp_path):
    made = scores()
    score = dataclasses.asdict(ScoreConfig(10))
    Selection.write(
        tmp_path / "selection",
        iter([np.array([2]), np.array([], np.int64), np.array([3])]),
        cache_digest="a" * 64,
        split="train",
        how={"rule": "TopRows", "m": 2},
        scores=made,
        score=score,
        cut=2.0,
    )
    selection = Selection.open(tmp_path / "selection", cache_digest="a" * 64)
    assert selection.row_ids.dtype == np.int64
    assert selection.row_ids.tolist() == [2, 3]
    assert selection.manifest["scores_digest"] == made.digest
    assert selection.manifest["cut"] == 2.0
    assert (selection.manifest["scorer"], selection.manifest["score"]) == (SCORER, score)


def test_a_random_control_has_no_scores(tmp_path):
    selection = Selection.write(
        tmp_path, np.array([0]), cache_digest="a" * 64, split="train", how={"rule": "RandomRows"}
    )
    assert selection.manifest["scores_digest"] is None
    assert selection.manifest["cut"] is None


@pytest.mark.parametrize("ids", [[[]], [[3, 2]], [[1, 1]], [[-1, 2]], [[1], [1]], [[4], [], [3]]])
def test_a_selection_ascends(tmp_path, ids):
    with pytest.raises(AssertionError):
        Selection.write(
            tmp_path,
            [np.array(block, np.int64) for block in ids],
            cache_digest="a",
            split="train",
            how={"rule": "x"},
        )
    assert list(tmp_path.iterdir()) == []


def test_another_cache_is_refused_by_name(scores, tmp_path):
    scores()
    Selection.write(
        tmp_path / "selection", np.array([0]), cache_digest="a" * 64, split="train", how={}
    )
    for kind, name in ((RowScores, "scores"), (Selection, "selection")):
        with pytest.raises(InputError, match=r"cache a{12}.*expected the cache b{12}"):
            kind.open(tmp_path / name, cache_digest="b" * 64)


def test_a_shard_cut_short_or_missing_is_refused_and_made_again(scores):
    made = scores()
    path = made.path / "shards" / "00001-of-00003.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"00001-of-00003\.npy has \d+ bytes, expected"):
        RowScores.open(made.path)
    path.unlink()
    with pytest.raises(InputError, match=r"does not exist, .*delete that file and run its `salt"):
        RowScores.open(made.path)
    assert scores().digest == made.digest
    assert path.read_bytes() == whole


def test_changed_bytes_are_refused_by_name(scores, tmp_path):
    made = scores()
    common = {"cache_digest": "a" * 64, "split": "train", "how": {}, "scores": made}
    Selection.write(tmp_path / "selection", np.array([2, 3]), **common)
    for file in ("scores/shards/00002-of-00003.npy", "selection/row_ids.npy"):
        data = bytearray((tmp_path / file).read_bytes())
        data[-1] ^= 1
        (tmp_path / file).write_bytes(data)
    opened = RowScores.open(made.path)
    assert opened.column("mean_k10")[:4].tolist() == [1.5, -np.inf, 3.0, 2.0]  # the other shards
    for rows in (slice(None), np.array([4])):
        with pytest.raises(InputError, match=r"00002.* has the digest .*copy the folder again"):
            opened.column("mean_k10")[rows]
    with pytest.raises(InputError, match=r"row_ids.npy has the digest .*copy the folder again"):
        Selection.open(tmp_path / "selection")


def test_a_selection_of_another_length_is_refused(tmp_path):
    Selection.write(tmp_path, np.arange(4), cache_digest="a", split="train", how={})
    np.save(tmp_path / "row_ids.npy", np.zeros(3, np.int64))
    with pytest.raises(InputError, match=r"int64\[3\], its manifest says int64\[4\]"):
        Selection.open(tmp_path)


def test_a_manifest_that_lacks_a_shard_is_refused(scores):
    made = scores()
    path = made.path / "manifest.json"
    manifest = {**json.loads(path.read_text()), "shard_rows": 1}
    from salt_jax.storage.manifests import write_manifest

    write_manifest(made.path, manifest)
    with pytest.raises(InputError, match="names 3 shards, expected 5 of 1 rows"):
        RowScores.open(made.path)


def test_equal_tokens_have_equal_hashes_whatever_pads_them():
    row = np.array([7, 8, 1, 0, 0], np.int32)
    segments = np.array([1, 1, 2, 0, 0])
    padded_otherwise = np.array([7, 8, 1, 9, 9], np.int32)
    assert targets_hash(row, segments) == targets_hash(padded_otherwise, segments)
    assert targets_hash(row, segments) == targets_hash(row[:3].astype(np.int64), segments[:3])
    assert targets_hash(row, segments) != targets_hash(row, np.array([1, 1, 1, 1, 0]))
    assert 0 <= targets_hash(row, segments) < 2**64
