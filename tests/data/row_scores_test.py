"""Scores and selections: they name their cache, and another cache is refused."""

import numpy as np
import pytest

from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.errors import InputError

SCORER = {"path": "slm", "step": 100, "digest": "d" * 64}
SCORE = {"k": 10, "unlearnable": "drop", "min_learnable_fraction": 0.0}


def _scores(folder, **changes):
    settings = {"cache_digest": "a" * 64, "split": "train", "scorer": SCORER, "score": SCORE}
    return RowScores.write(folder, np.array([1.5, -np.inf, 3.0, 2.0]), **{**settings, **changes})


def _cost(seconds):
    return {"flops": 1e12, "tokens": 4096, "seconds": seconds}


def test_scores_come_back(tmp_path):
    written = _scores(tmp_path)
    opened = RowScores.open(tmp_path, cache_digest="a" * 64)
    assert opened.scores.dtype == np.float32
    assert opened.scores.tolist() == [1.5, -np.inf, 3.0, 2.0]
    assert opened.manifest["scorer"] == SCORER
    assert opened.manifest["rows"] == 4
    assert opened.digest == written.digest != _scores(tmp_path, split="test").digest


def test_the_digest_tells_scores_apart(tmp_path):
    first = _scores(tmp_path)
    second = RowScores.write(
        tmp_path,
        np.array([1.5, -np.inf, 3.0, 2.5]),
        cache_digest="a" * 64,
        split="train",
        scorer=SCORER,
        score=SCORE,
    )
    assert first.digest != second.digest


def test_the_digest_is_of_the_scores_and_not_of_what_they_cost(tmp_path):
    digests = [_scores(tmp_path, cost=_cost(seconds)).digest for seconds in (1.0, 2.0)]
    assert digests == [_scores(tmp_path).digest] * 2


def test_a_selection_carries_what_its_scores_cost(tmp_path):
    common = {"cache_digest": "a" * 64, "split": "train", "how": {}}

    def selected(scores):
        return Selection.write(tmp_path / "selection", np.array([2, 3]), scores=scores, **common)

    known = selected(_scores(tmp_path / "scores", cost=_cost(5.0)))
    assert known.manifest["scoring_cost"] == _cost(5.0)
    again = selected(_scores(tmp_path / "scores", cost=_cost(6.0)))
    assert again.digest == known.digest
    assert selected(_scores(tmp_path / "scores")).manifest["scoring_cost"] is None
    at_random = selected(None).manifest["scoring_cost"]
    assert at_random == {"flops": 0.0, "tokens": 0, "seconds": 0.0}


def test_a_selection_carries_where_it_came_from(tmp_path):
    scores = _scores(tmp_path / "scores")
    Selection.write(
        tmp_path / "selection",
        np.array([2, 3]),
        cache_digest="a" * 64,
        split="train",
        how={"rule": "TopRows", "m": 2},
        scores=scores,
    )
    selection = Selection.open(tmp_path / "selection", cache_digest="a" * 64)
    assert selection.row_ids.dtype == np.int64
    assert selection.row_ids.tolist() == [2, 3]
    assert selection.manifest["scores_digest"] == scores.digest
    assert selection.manifest["cut"] == 2.0
    assert (selection.manifest["scorer"], selection.manifest["score"]) == (SCORER, SCORE)


def test_a_random_control_has_no_scores(tmp_path):
    selection = Selection.write(
        tmp_path, np.array([0]), cache_digest="a" * 64, split="train", how={"rule": "RandomRows"}
    )
    assert selection.manifest["scores_digest"] is None
    assert selection.manifest["cut"] is None


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1, 2]])
def test_a_selection_ascends(tmp_path, ids):
    with pytest.raises(AssertionError):
        Selection.write(
            tmp_path, np.array(ids, int), cache_digest="a", split="train", how={"rule": "x"}
        )


def test_another_cache_is_refused_by_name(tmp_path):
    _scores(tmp_path / "scores")
    Selection.write(
        tmp_path / "selection", np.array([0]), cache_digest="a" * 64, split="train", how={}
    )
    for kind, name in ((RowScores, "scores"), (Selection, "selection")):
        with pytest.raises(InputError, match=r"cache a{12}.*expected the cache b{12}"):
            kind.open(tmp_path / name, cache_digest="b" * 64)


def test_a_file_cut_short_is_refused(tmp_path):
    _scores(tmp_path)
    path = tmp_path / "scores.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"scores\.npy cannot be read"):
        RowScores.open(tmp_path)


def test_changed_arrays_are_refused_by_name(tmp_path):
    scores = _scores(tmp_path / "scores")
    common = {"cache_digest": "a" * 64, "split": "train", "how": {}, "scores": scores}
    Selection.write(tmp_path / "selection", np.array([2, 3]), **common)
    for kind, file in ((RowScores, "scores/scores.npy"), (Selection, "selection/row_ids.npy")):
        data = bytearray((tmp_path / file).read_bytes())
        data[-8] ^= 1
        (tmp_path / file).write_bytes(data)
        with pytest.raises(InputError, match=rf"{file} has the digest .*copy the folder again"):
            kind.open((tmp_path / file).parent)


def test_a_file_of_another_length_is_refused(tmp_path):
    _scores(tmp_path)
    np.save(tmp_path / "scores.npy", np.zeros(3, np.float32))
    with pytest.raises(InputError, match=r"float32\[3\], its manifest says float32\[4\]"):
        RowScores.open(tmp_path)
