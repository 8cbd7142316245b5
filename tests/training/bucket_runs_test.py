"""Runs whose output is in gs://, without a copy on disk."""

import json
import pathlib
from collections.abc import Callable

import pytest

from salt_jax.errors import InputError
from salt_jax.storage.buckets import RemoteFolder, path_of
from salt_jax.storage.run_lock import RunLock
from salt_jax.training.checkpoint_digests import check_digests
from salt_jax.training.checkpoint_items import ITEMS
from salt_jax.training.checkpoints import complete_steps
from tests.bucket_emulator import BucketEmulator

pytest.importorskip("gcsfs")
URL, PLACE = "gs://bucket/runs/a", "bucket/runs/a"
Run = Callable[..., pathlib.Path]


def test_at_every_change_of_the_bucket_the_newest_checkpoint_is_whole(
    bucket: BucketEmulator, run_train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a kill at that moment would leave; a checkpoint takes the place of the one before."""
    states: list[dict[str, bytes]] = []
    store, delete = bucket.store, bucket.delete

    def stored(*given: str) -> None:
        store(*given)
        states.append({**bucket.objects})

    def deleted(name: str) -> None:
        delete(name)
        states.append({**bucket.objects})

    bucket.store, bucket.delete = stored, deleted
    run_train(path_of(URL))
    bucket.store, bucket.delete = store, delete
    newest: list[int] = []
    checked: dict[str, bytes] = {}
    for state in states:
        bucket.objects = state
        if steps := complete_steps(path_of(URL)):
            newest.append(steps[-1])
            folder = f"{PLACE}/checkpoints/{steps[-1]}/"
            own = {name: held for name, held in state.items() if name.startswith(folder)}
            if own != checked:  # most changes are of other files
                check_digests(path_of(f"{URL}/checkpoints/{steps[-1]}"), ITEMS)
                checked = own
    assert newest == sorted(newest)
    assert {*newest} == {2, 4, 6}
    assert "not checked" not in capfd.readouterr().err
    assert complete_steps(path_of(URL)) == [2, 4, 6]


def test_a_run_that_an_older_version_sent_goes_on(
    bucket: BucketEmulator, run_train: Run, tmp_path: pathlib.Path
) -> None:
    """digests.json was sent last; what lacks a file that it names is no checkpoint."""
    run_train(tmp_path / "run", steps=4)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    RemoteFolder(URL).put(tmp_path / "run", [str(p.relative_to(tmp_path / "run")) for p in files])
    bucket.objects[f"{PLACE}/checkpoints/9/digests.json"] = b'{"params/gone": "00"}'
    run_train(path_of(URL))
    assert complete_steps(path_of(URL)) == [2, 4, 6]
    records = bucket.objects[f"{PLACE}/metrics.jsonl"].decode().splitlines()
    steps = [json.loads(line)["step"] for line in records if '"train"' in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["lr[1]", "run*", "run?"])
def test_a_url_that_checkpoints_cannot_have(
    bucket: BucketEmulator, run_train: Run, name: str
) -> None:
    with pytest.raises(InputError, match="in its path"):
        run_train(path_of(f"gs://bucket/{name}"))
    assert not bucket.objects


def test_a_bucket_that_may_be_read_and_not_written(bucket: BucketEmulator, run_train: Run) -> None:
    bucket.failing = {"write", "begin"}
    with pytest.raises(InputError, match="cannot be written"):
        run_train(path_of(URL))
    assert not bucket.objects


def test_of_two_launches_one_is_refused(
    bucket: BucketEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALT_MISSING_SECONDS", "2")
    with RunLock() as first, RunLock() as second:
        first.acquire(path_of(URL), "train")
        with pytest.raises(InputError, match=r"being written by another `salt train` \(process"):
            second.acquire(path_of(URL), "train")
        first.release()
        assert not bucket.objects
        second.acquire(path_of(URL), "train")
    assert not bucket.objects


def test_a_dead_owner_of_another_machine_is_replaced(
    bucket: BucketEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALT_MISSING_SECONDS", "0.2")
    owner = {"verb": "train", "pid": 1, "host": "another", "token": "1"}
    bucket.store(f"{PLACE}/.lock", json.dumps(owner).encode())
    with RunLock() as lock:
        lock.acquire(path_of(URL), "train")
        assert json.loads(bucket.objects[f"{PLACE}/.lock"])["host"] != "another"
    assert not bucket.objects
