"""A pass in shards: stopped anywhere, divided anyhow, it ends with the same bytes."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.block_copies import InputFolder
from salt_jax.storage.restartable_shards import FinishedShards, RestartableShards, Shard

MADE_FROM = {"cache": "a" * 64, "scorer": {"path": "slm", "digest": "d" * 64}, "k": [10]}


def of(folder: pathlib.Path, rows: int = 10, shard_rows: int = 3, **changes) -> RestartableShards:
    return RestartableShards(
        folder,
        rows=rows,
        shard_rows=shard_rows,
        suffix=".data",
        made_from={**MADE_FROM, **changes},
    )


def begun(folder: pathlib.Path, *sizes: int, **changes) -> RestartableShards:
    shards = of(folder, *sizes, **changes)
    shards.begin()
    return shards


def make(shards: RestartableShards, shard: Shard, seconds: float = 1.0) -> None:
    with shards.writing(shard) as file:
        for row in shard.rows:
            file.write(bytes([row % 256]))
        file.finish({"sum": sum(shard.rows)}, {"seconds": seconds})


def counting(folder: pathlib.Path) -> dict[str, bytes]:
    """What must not depend on how a pass went."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    kept = [file for file in files if file.suffix == ".data" or file.parent == folder]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), shard_rows=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_any_stops_and_workers_give_the_same_bytes(tmp_path_factory, rows, shard_rows, seed):
    rng = np.random.default_rng(seed)
    straight, stopped = (tmp_path_factory.mktemp(name) for name in ("straight", "stopped"))
    alone = begun(straight, rows, shard_rows)
    for shard in alone.unfinished():
        make(alone, shard)
    alone.finish("row_scores")
    made = []
    while not made or of(stopped, rows, shard_rows).unfinished():
        workers = int(rng.integers(1, 5))
        for worker in range(workers):
            shards = begun(stopped, rows, shard_rows)
            mine = shards.unfinished(worker, workers)
            assert {shard.index % workers for shard in mine} <= {worker}
            for shard in mine[: int(rng.integers(4))]:
                make(shards, shard, seconds=float(rng.random()))
                made.append(shard.index)
    assert sorted(made) == list(range(-(-rows // shard_rows)))  # none twice, none missing
    shards.finish("row_scores")
    shards.finish("row_scores")  # another worker, which found the same
    assert counting(stopped) == counting(straight)
    assert shards.total("sum") == sum(range(rows))
    manifest = json.loads((stopped / "manifest.json").read_text())
    finished = FinishedShards(InputFolder(stopped), manifest, ".data", "salt score")
    content = b"".join(finished.path(i).read_bytes() for i in range(len(made)))
    assert content == bytes(row % 256 for row in range(rows))


def test_an_error_leaves_nothing_and_what_a_kill_leaves_is_cleared(tmp_path):
    shards = begun(tmp_path)
    first = shards.unfinished()[0]
    with pytest.raises(TypeError), shards.writing(first) as file:
        file.write(None)
    assert list((tmp_path / "shards").iterdir()) == []
    with pytest.raises(AssertionError, match="never finished"), shards.writing(first) as file:
        file.write(b"abc")
    assert shards.unfinished()[0] == first
    (tmp_path / "shards" / "00000-of-00004.data.0123abcd.tmp").write_bytes(b"ab")
    (tmp_path / "shards" / "00000-of-00004.json.0123abcd.tmp").write_bytes(b"{")
    (tmp_path / "shards" / "00000-of-00004.data").write_bytes(b"abc")  # killed before its .json
    assert shards.unfinished()[0] == first
    for shard in shards.unfinished():
        make(shards, shard)
    shards.finish("row_scores")
    assert not list((tmp_path / "shards").glob("*.tmp"))


def test_two_workers_on_one_shard_leave_it_whole(tmp_path):
    """One takes over what the other, thought to be gone, is still at."""
    shards = begun(tmp_path)
    first = shards.unfinished()[0]
    with shards.writing(first) as slow:
        slow.write(bytes([0, 1]))
        make(shards, first)
        slow.write(bytes([2]))
        slow.finish({"sum": 3}, {"seconds": 9.0})
    assert first not in shards.unfinished()
    assert (tmp_path / "shards" / "00000-of-00004.data").read_bytes() == bytes([0, 1, 2])


def test_shards_of_another_pass_do_not_count(tmp_path):
    shards = begun(tmp_path)
    make(shards, shards.unfinished()[0])
    (tmp_path / "pass.json").unlink()
    other = begun(tmp_path, scorer={"path": "slm", "digest": "e" * 64})
    assert len(other.unfinished()) == 4
    with pytest.raises(InputError, match="begun with the scorer"):
        begun(tmp_path)  # the plan that came first stays


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": "b" * 64}, r"with the cache aaaaaaaaaaaa…, and now the cache is bbbbbbbbbbbb…"),
        ({"scorer": {"path": "slm", "digest": "e" * 64}}, "the scorer dddddddddddd…"),
        ({"k": [5, 10]}, r"with the k \[10\], and now the k is \[5, 10\]: go back to that k"),
        ({"rows": 11}, "with the rows 10, and now the rows is 11"),
        ({"tau": 1}, "with the tau None, and now the tau is 1"),
    ],
)
def test_another_pass_is_refused_by_name(tmp_path, changes, words):
    begun(tmp_path)
    before = counting(tmp_path)
    with pytest.raises(InputError, match=words):
        of(tmp_path, **changes)
    assert counting(tmp_path) == before


def test_the_same_model_may_be_named_otherwise_and_keeps_its_name(tmp_path):
    begun(tmp_path)
    again = of(tmp_path, scorer={"path": "../slm", "digest": "d" * 64})
    assert again.made_from == MADE_FROM


def test_a_pass_goes_on_in_the_shards_that_it_was_begun_with(tmp_path):
    first = begun(tmp_path)
    make(first, first.unfinished()[0])
    again = begun(tmp_path, shard_rows=4)
    assert [shard.rows for shard in again.unfinished()] == [
        range(3, 6),
        range(6, 9),
        range(9, 10),
    ]
    plan = json.loads((tmp_path / "pass.json").read_text())
    for damaged in (0, "3", None, True):
        (tmp_path / "pass.json").write_text(json.dumps({**plan, "shard_rows": damaged}))
        with pytest.raises(InputError, match=r"pass.json has shard_rows .*: choose another --out"):
            of(tmp_path)


def test_no_reader_accepts_a_pass_that_lacks_a_shard(tmp_path):
    shards = begun(tmp_path)
    for shard in shards.unfinished():
        make(shards, shard)
    shards.finish("row_scores")
    assert begun(tmp_path).completed
    (tmp_path / "shards" / "00002-of-00004.data").unlink()
    again = of(tmp_path)
    assert [shard.index for shard in again.unfinished()] == [2]
    assert again.completed
    again.begin()
    assert not again.completed


def test_shards_of_no_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="shard_rows is 0 and must be at least 1"):
        of(tmp_path, shard_rows=0)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_refuses_a_shard_fails_the_run_and_keeps_the_others(bucket, tmp_path):
    shards = begun("gs://bucket/pass")
    first, second, *_ = shards.unfinished()
    make(shards, first)
    bucket.denying = True
    with pytest.raises(RunFailed, match="shards that are finished are kept"):
        make(shards, second)
    bucket.denying = False
    assert first not in of("gs://bucket/pass").unfinished()
    assert second in of("gs://bucket/pass").unfinished()
