"""Runs whose output is in gs://, without a copy on disk."""

import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.buckets import path_of
from salt_jax.storage.run_lock import RunLock
from salt_jax.training import checkpoint_digests, loop
from salt_jax.training.checkpoint_digests import (
    COMMIT_MARK,
    VERSIONS_FILE,
    check_together,
    write_digests,
)
from salt_jax.training.checkpoint_items import ITEMS
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import CheckpointConfig, complete_steps, find_model
from salt_jax.training.converted_checkpoints import open_parameters
from salt_jax.training.partitioning import MeshConfig
from tests.bucket_emulator import BucketEmulator

pytest.importorskip("gcsfs")
pytestmark = pytest.mark.usefixtures("failed_tasks_are_collected")
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
                # So that all is read.
                bucket.objects = {n: held for n, held in state.items() if VERSIONS_FILE not in n}
                check_together(path_of(f"{URL}/checkpoints/{steps[-1]}"), ITEMS)
                checked = own
    assert newest == sorted(newest)
    assert {*newest} == {2, 4, 6}
    assert "not checked" not in capfd.readouterr().err
    assert complete_steps(path_of(URL)) == [2, 4, 6]
    find_model(URL, 4, "teacher").load_params(MeshConfig().make())
    assert f"{PLACE}/checkpoints/4/{VERSIONS_FILE}" in bucket.objects


def test_what_a_kill_left_of_a_removal_is_removed(
    bucket: BucketEmulator,
    run_train: Run,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the first process alone, and after the last step too; whole ones and those to be kept
    stay, and all where the newest is not whole."""
    on_disk = run_train(tmp_path, checkpoints=CheckpointConfig(1, keep_every=1))
    for step in (1, 2):
        next((on_disk / f"checkpoints/{step}/optimizer/d").iterdir()).unlink()
    (on_disk / "checkpoints/3/digests.json").unlink()
    bucket.take(on_disk, PLACE)
    for step in range(1, 7):
        bucket.store(f"{PLACE}/checkpoints/{step}/{COMMIT_MARK}", b"")
    kept = CheckpointConfig(keep_steps=(1,))
    for run in (on_disk, path_of(URL)):
        with monkeypatch.context() as patched:
            patched.setattr(jax, "process_index", lambda: 1)
            Checkpointer(run, kept).close()
        newest = run / "checkpoints/6/digests.json"
        digests = newest.read_bytes()
        newest.unlink()
        Checkpointer(run, kept).close()
        assert complete_steps(run) == [1, 2, 3, 4, 5, 6]
        newest.write_bytes(digests)
        Checkpointer(run, kept).close()
        assert complete_steps(run) == [1, 4, 5, 6]


def test_an_older_checkpoint_that_cannot_be_removed(
    bucket: BucketEmulator, run_train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """The new one is whole, and training goes on."""
    bucket.failing = {"delete"}
    run_train(path_of(URL), checkpoints=CheckpointConfig(2, keep_last=1))
    error = capfd.readouterr().err
    assert f"a checkpoint before step 6 is not removed: {URL}/checkpoints cannot" in error
    assert "COULD NOT BE WRITTEN" not in error
    assert {*complete_steps(path_of(URL))} >= {2, 6}


def test_a_process_lost_during_a_save_is_no_refusal_of_the_bucket(
    bucket: BucketEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its missing beat names it, and all end with 75."""
    checkpointer = Checkpointer(path_of(URL), CheckpointConfig())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = jax.errors.JaxRuntimeError("Gloo: connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), checkpointer._surviving():
        raise lost
    with pytest.raises(TimeoutError), checkpointer._surviving():
        raise TimeoutError("barrier") from lost
    with pytest.raises(RunFailed, match="could not be written"), checkpointer._surviving():
        raise ConnectionError("refused")


def test_a_run_that_an_older_version_sent_goes_on(
    bucket: BucketEmulator, run_train: Run, tmp_path: pathlib.Path
) -> None:
    """digests.json was sent last; what lacks a file that it names is no checkpoint."""
    run_train(tmp_path / "run", steps=4)
    bucket.take(tmp_path / "run", PLACE)
    bucket.objects[f"{PLACE}/checkpoints/9/digests.json"] = b'{"params/gone": "00"}'
    run_train(path_of(URL))
    assert complete_steps(path_of(URL)) == [2, 4, 6]
    records = bucket.objects[f"{PLACE}/metrics.jsonl"].decode().splitlines()
    steps = [json.loads(line)["step"] for line in records if '"train"' in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_model_in_a_bucket_is_read_without_a_copy(
    bucket: BucketEmulator, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bucket.take(slm, PLACE)
    there, on_disk = find_model(URL, 4, "teacher"), find_model(slm, 4, "teacher")
    assert (there.identity["path"], there.digest) == (URL, on_disk.digest)
    mesh = MeshConfig().make()
    params = there.load_params(mesh)
    jax.tree.map(np.testing.assert_array_equal, params, on_disk.load_params(mesh))
    leaves = traverse_util.flatten_dict(params)
    opened = open_parameters(there.run_path, 4, leaves)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(opened[name].read(), leaf)
    assert there.load_vocabulary().fingerprint == on_disk.vocabulary_fingerprint
    assert not [path for path in (tmp_path / "copies").rglob("*") if path.name == "checkpoints"]


def test_what_a_bucket_still_has_is_not_read_for_its_digest(
    bucket: BucketEmulator, slm: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.take(slm, PLACE)
    folder = path_of(f"{URL}/checkpoints/4")
    check_together(folder, ITEMS)
    write_digests(folder, ITEMS)
    read, digest = [], checkpoint_digests.file_digest

    def noted(path: pathlib.Path) -> str:
        if path.name != COMMIT_MARK:  # which has none
            read.append(path.relative_to(folder))
        return digest(path)

    monkeypatch.setattr(checkpoint_digests, "file_digest", noted)
    check_together(folder, ITEMS)
    assert not read
    name = next(n for n in bucket.objects if f"{PLACE}/checkpoints/4/params/" in n and "/d/" in n)
    bucket.store(name, bucket.objects[name])
    check_together(folder, ITEMS)
    assert [f"{PLACE}/checkpoints/4/{path}" for path in read] == [name]
    bucket.store(name, bucket.objects[name][:-1])
    with pytest.raises(InputError, match="is damaged"):
        check_together(folder, ITEMS)


def test_a_model_in_a_bucket_that_is_damaged(bucket: BucketEmulator, slm: pathlib.Path) -> None:
    bucket.take(slm, PLACE)
    with pytest.raises(InputError, match=r"step 5 of gs://.*, which has 4, 12:"):
        find_model(URL, 5, "teacher")
    name = next(n for n in bucket.objects if f"{PLACE}/checkpoints/12/params/" in n and "/d/" in n)
    held = bytearray(bucket.objects[name])
    held[len(held) // 2] ^= 1
    bucket.store(name, bytes(held))
    with pytest.raises(InputError, match=r"gs://bucket/runs/a/checkpoints/12 is damaged"):
        find_model(URL, None, "teacher")
    bucket.failing = {"read"}
    with pytest.raises(InputError, match=r"gs://bucket/runs/a.* cannot be read \(.*Forbidden"):
        find_model(URL, 4, "teacher")


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


# Begins a run, says so, and holds its lock.
HOLDER = """
import sys
from salt_jax.storage.buckets import path_of
from salt_jax.storage.run_folder import RunFolder
from salt_jax.storage.run_lock import RunLock
with RunLock() as lock:
    RunFolder(path_of(sys.argv[1]), "train", lock=lock).begin()
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("emptied", "code", "said"),
    [
        (True, 2, f"{URL} was emptied under this run, which ends: restore its objects"),
        (False, 75, f"{URL}/.lock was taken by another launch"),
    ],
)
def test_a_run_whose_lock_is_gone_ends(
    bucket: BucketEmulator,
    monkeypatch: pytest.MonkeyPatch,
    emptied: bool,
    code: int,
    said: str,
) -> None:
    monkeypatch.setenv("SALT_MISSING_SECONDS", "0.5")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, URL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        if emptied:
            bucket.objects.clear()
        else:
            bucket.store(f"{PLACE}/.lock", b"{}")
        assert process.wait() == code
        assert said in process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "kept"), [(6, [2, 4]), (4, [2, 6])])
def test_credentials_that_end_during_a_save(
    bucket: BucketEmulator,
    run_train: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    lost: int,
    kept: list[int],
) -> None:
    """They are back at step 6, if it isn't the one; the newest whole checkpoint counts."""

    async def at_once(seconds: float) -> None:
        """gcsfs waits half a minute for credentials to come back."""

    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=at_once))
    store, original = bucket.store, loop.Loop._step

    def stored(name: str, *given: Any) -> None:
        store(name, *given)
        bucket.denying = bucket.denying or f"/checkpoints/{lost}/" in name

    def step(self: Any, number: int, *rest: Any) -> Any:
        self._checkpointer.wait()
        bucket.denying = bucket.denying and number < 5
        return original(self, number, *rest)

    monkeypatch.setattr(loop.Loop, "_step", step)
    bucket.store = stored
    if lost == 6:
        said = r"step 6 could not be .*: restore the access to it .* resumes from step 4"
        with pytest.raises(RunFailed, match=said):
            run_train(path_of(URL))
    else:
        run_train(path_of(URL))
    bucket.store, bucket.denying = store, False
    assert f"STEP {lost} COULD NOT BE WRITTEN: {URL}/checkpoints cannot" in capfd.readouterr().err
    assert complete_steps(path_of(URL)) == kept
    run_train(path_of(URL))
    assert complete_steps(path_of(URL)) == sorted({*kept, 6})
