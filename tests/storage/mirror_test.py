"""Output folders in a bucket: what is sent, what is taken, and what a kill or a network costs."""

import contextlib
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from salt_jax.errors import InputError, RunFailed
from salt_jax.storage.mirror import Mirror
from tests.bucket_emulator import BucketEmulator

URL = "s3://bucket/runs/a"
PLACE = "bucket/runs/a"

pytest.importorskip("s3fs")


@pytest.fixture(autouse=True)
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent before the end, unless a test wants it."""
    monkeypatch.setenv("SALT_SEND_SECONDS", "1e6")


@contextlib.contextmanager
def mirrored(url: str = URL) -> Iterator[pathlib.Path]:
    with Mirror(url, "train") as mirror:
        yield mirror.path


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def held(bucket: BucketEmulator) -> dict[str, str]:
    return {name: bucket.objects[f"{PLACE}/{name}"].decode() for name in bucket.names(PLACE)}


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, name: str) -> None:
    monkeypatch.setenv("SALT_LOCAL_COPIES", str(tmp_path / name))


def test_what_is_complete_is_sent_and_the_rest_stays(bucket):
    with mirrored() as path:
        write(path / "run.json", "{}")
        write(path / "metrics.jsonl", "1")
        write(path / "checkpoints/10/params/p", "p")
        write(path / "checkpoints/20.orbax-checkpoint-tmp-3/params/p", "half")
        write(path / "summary.json.0123abcd.tmp", "half")
        write(path / "processes/0.json", "beat")
        write(path / "cache/run.json", "{}")
        write(path / "cache/work/part-0", "part")
        write(path / "by_hand/work/x", "x")
    assert held(bucket) == {
        "run.json": "{}",
        "metrics.jsonl": "1",
        "checkpoints/10/params/p": "p",
        "cache/run.json": "{}",
        "by_hand/work/x": "x",
    }


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_url_is_no_pattern(bucket, monkeypatch, tmp_path, scheme, library):
    pytest.importorskip(library)
    url, names = f"{scheme}://bucket/lr[0.003]/run*?", {"run.json", "[1]*/x"}
    with mirrored(f"{scheme}://bucket/lr0/run_1") as path:
        write(path / "other", "")
    with mirrored(url) as path:
        for name in (*names, "gone?"):
            write(path / name, name)
    with mirrored(url) as path:
        (path / "gone?").unlink()
    assert set(bucket.names("bucket/lr[0.003]/run*?")) == names
    on_another_machine(monkeypatch, tmp_path, "there")
    with mirrored(url) as path:
        assert {name: (path / name).read_text() for name in names} == {n: n for n in names}
    assert set(bucket.names("bucket/lr0/run_1")) == {"other"}


def test_it_is_sent_while_the_run_goes_on(bucket, monkeypatch):
    monkeypatch.setenv("SALT_SEND_SECONDS", "0.01")
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
        assert bucket.wait_for(f"{PLACE}/metrics.jsonl")


def test_what_the_run_removes_goes_after_what_takes_its_place(bucket):
    with mirrored() as path:
        for name in ("params/p", "digests.json"):
            write(path / "checkpoints/10" / name, "10")
    with mirrored() as path:
        for name in ("params/p", "digests.json"):
            (path / "checkpoints/10" / name).unlink()
            write(path / "checkpoints/20" / name, "20")
    kinds = [(kind, name.removeprefix(f"{PLACE}/checkpoints/")) for kind, name in bucket.changed]
    assert kinds[-4:] == [
        ("write", "20/params/p"),
        ("write", "20/digests.json"),
        ("delete", "10/digests.json"),
        ("delete", "10/params/p"),
    ]


def test_a_run_goes_on_on_another_machine_and_comes_back(bucket, monkeypatch, tmp_path):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
        write(path / "old", "old")
    on_another_machine(monkeypatch, tmp_path, "second")
    with mirrored() as path:
        assert (path / "metrics.jsonl").read_text() == "1"
        write(path / "metrics.jsonl", "1 2")
        (path / "old").unlink()
    on_another_machine(monkeypatch, tmp_path, "copies")
    with mirrored() as path:
        assert (path / "metrics.jsonl").read_text() == "1 2"
        assert not (path / "old").exists()


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_folder_of_several_pages_goes_to_another_machine(
    bucket, monkeypatch, tmp_path, scheme, library
):
    pytest.importorskip(library)
    bucket.page = 3
    names = [f"cache/rows-{number}" for number in range(10)]
    with mirrored(f"{scheme}://{PLACE}") as path:
        for name in names:
            write(path / name, name)
    assert held(bucket) == {name: name for name in names}
    on_another_machine(monkeypatch, tmp_path, "second")
    with mirrored(f"{scheme}://{PLACE}") as path:
        assert {name: (path / name).read_text() for name in names} == {n: n for n in names}
        (path / names[0]).unlink()
        write(path / names[9], "anew")
    assert held(bucket) == {name: name for name in names[1:9]} | {names[9]: "anew"}


def test_what_a_kill_left_unsent_is_sent_by_the_same_machine(bucket):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
    write(path / "metrics.jsonl", "2")  # of the same size
    write(path / "new", "new")
    with mirrored() as path:
        assert (path / "metrics.jsonl").read_text() == "2"
    assert held(bucket) == {"metrics.jsonl": "2", "new": "new"}


def test_what_another_machine_wrote_since_counts_and_nothing_unsent_is_lost(
    bucket, monkeypatch, tmp_path, capfd
):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
    on_another_machine(monkeypatch, tmp_path, "second")
    with mirrored() as other:
        write(other / "metrics.jsonl", "other")
    write(path / "metrics.jsonl", "unsent")
    write(path / "checkpoints/10/params/p", "unsent")
    on_another_machine(monkeypatch, tmp_path, "copies")
    with mirrored() as path:
        assert (path / "metrics.jsonl").read_text() == "other"
        assert not (path / "checkpoints").exists()
    (kept,) = (path.parent / "a.copy").glob("unsent-*")
    assert (kept / "checkpoints/10/params/p").read_text() == "unsent"
    assert f"2 files that were not sent are in {kept}" in capfd.readouterr().err


def test_a_checkpoint_that_was_sent_in_part_is_passed_over_until_it_is_sent_anew(bucket):
    for name in ("10/params/p", "10/digests.json", "20/params/half"):
        bucket.store(f"{PLACE}/checkpoints/{name}", b"old")
    with mirrored() as path:
        assert [p.name for p in (path / "checkpoints").iterdir()] == ["10"]
    assert bucket.names(f"{PLACE}/checkpoints") == {
        "10/params/p",
        "10/digests.json",
        "20/params/half",
    }
    with mirrored() as path:
        write(path / "checkpoints/20/params/p", "new")
        write(path / "checkpoints/20/digests.json", "new")
    assert bucket.names(f"{PLACE}/checkpoints/20") == {"params/p", "digests.json"}


def test_a_checkpoint_that_a_kill_left_half_removed_goes_with_the_next(bucket):
    for name in ("10/params/half", "20/params/p", "20/digests.json"):
        bucket.objects[f"{PLACE}/checkpoints/{name}"] = b"old"
    bucket.objects[f"{PLACE}/other/checkpoints/5/params/half"] = b"of another run"
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
    assert "checkpoints/10/params/half" in held(bucket)  # perhaps its writer's, still
    with mirrored() as path:
        for name in ("params/p", "digests.json"):
            write(path / "checkpoints/30" / name, "new")
    assert held(bucket).keys() == {
        *("checkpoints/20/params/p", "checkpoints/20/digests.json", "metrics.jsonl"),
        *("checkpoints/30/params/p", "checkpoints/30/digests.json"),
        "other/checkpoints/5/params/half",
    }


def test_an_empty_bucket_where_much_was_sent_is_another_one(bucket):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
    bucket.objects.clear()
    with pytest.raises(InputError, match="whose credentials"), mirrored():
        pass
    assert (path / "metrics.jsonl").read_text() == "1"


def test_a_copy_without_its_record_is_kept(bucket):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
    (path.parent / "a.copy/copied.json").write_text("damaged")
    with mirrored() as path:
        assert (path / "metrics.jsonl").read_text() == "1"
    assert len(list((path.parent / "a.copy").glob("unsent-*"))) == 1


def test_a_folder_above_is_a_copy_of_its_own(bucket):
    with mirrored(f"{URL}/b") as path:
        write(path / "checkpoints/10/params/p", "p")
    (path / "checkpoints/10/digests.json").write_text("unsent")
    with mirrored():
        pass
    with mirrored(f"{URL}/b") as path:
        assert (path / "checkpoints/10/digests.json").read_text() == "unsent"


class Killed(BaseException):
    """As by SIGKILL: nobody catches it."""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_kill_at_any_call_leaves_nothing_that_only_seems_whole(
    bucket, monkeypatch, tmp_path, elsewhere
):
    """A checkpoint takes another's place and new shards the old ones', killed at the n-th call."""
    n, killed = 0, True
    while killed:
        n += 1
        bucket.objects.clear()
        on_another_machine(monkeypatch, tmp_path, f"machine {n}")
        with mirrored() as path:
            make_anew(path, "10", "old")
        mirror = Mirror(URL, "train")
        with monkeypatch.context() as patch, mirror_to_be_killed(mirror):
            shutil.rmtree(mirror.path / "checkpoints")
            make_anew(mirror.path, "20", "new")
            kill_at(n, mirror, patch)
            try:
                mirror.send()
                killed = False
            except Killed:
                assert_whole(bucket)
        if elsewhere:
            on_another_machine(monkeypatch, tmp_path, f"other {n}")
        with mirrored() as path:
            steps = [folder.name for folder in (path / "checkpoints").iterdir()]
        assert_whole(bucket)
        assert steps == ["20"] or (elsewhere and "10" in steps)
        if not elsewhere:
            assert bucket.objects[f"{PLACE}/COMPLETED"] == b"new"
    assert n > 10


def make_anew(path: pathlib.Path, step: str, text: str) -> None:
    for name in ("params/p", "digests.json"):
        write(path / "checkpoints" / step / name, step)
    for name in ("rows-0", "rows-1", "manifest.json", "COMPLETED"):
        write(path / name, text)


def assert_whole(bucket: BucketEmulator) -> None:
    there = held(bucket)
    steps = {name.split("/")[1] for name in there if name.endswith("/digests.json")}
    assert steps
    for step in steps:
        assert there[f"checkpoints/{step}/params/p"] == step
    if "COMPLETED" in there:
        names = ("rows-0", "rows-1", "manifest.json", "COMPLETED")
        assert len({there[name] for name in names}) == 1, there


@contextlib.contextmanager
def mirror_to_be_killed(mirror: Mirror) -> Iterator[None]:
    """Begins it; at the end of the block nothing more is sent."""
    mirror.__enter__()
    try:
        yield
    finally:
        mirror._ended.set()
        mirror._thread.join()
        mirror._lock.release()


def kill_at(n: int, mirror: Mirror, patch: pytest.MonkeyPatch) -> None:
    """From here on the n-th call that changes the bucket or the record is the last."""
    calls = itertools.count(1)

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any, **settings: Any) -> None:
            if next(calls) == n:
                raise Killed
            function(*given, **settings)

        return call

    files = mirror._folder._files
    put_one = counted(files.put)

    def put(sources: list[str], targets: list[str], **settings: Any) -> None:
        for source, target in zip(sources, targets, strict=True):
            put_one([source], [target], **settings)

    patch.setattr(files, "put", put)
    patch.setattr(files, "rm_file", counted(files.rm_file))
    patch.setattr(mirror._copy, "note", counted(mirror._copy.note))


def test_commands_one_after_the_other_see_what_the_first_has_sent(bucket, monkeypatch):
    """The bucket is listed under the lock: what another command was sending is whole by then."""
    with mirrored() as path:
        make_anew(path, "10", "old")
        second = Mirror(URL, "train")
        list_files = second._folder.files
        monkeypatch.setattr(second._folder, "files", lambda: pytest.fail("listed without the lock"))
        with pytest.raises(InputError, match="being written by another"):
            second.__enter__()
    monkeypatch.setattr(second._folder, "files", list_files)
    with second:
        assert (second.path / "checkpoints/10/params/p").read_text() == "10"


def test_a_checkpoint_that_is_removed_while_it_is_sent_arrives_and_goes(bucket):
    mirror = Mirror(URL, "train")
    put = mirror._folder.put

    def removed_meanwhile(folder: pathlib.Path, names: list[str]) -> None:
        shutil.rmtree(mirror.path / "checkpoints")
        put(folder, names)

    with mirror:
        for name in ("params/p", "digests.json"):
            write(mirror.path / "checkpoints/10" / name, "10")
        mirror._folder.put = removed_meanwhile
        mirror.send()
        assert bucket.names(f"{PLACE}/checkpoints") == {"10/params/p", "10/digests.json"}
        mirror._folder.put = put
    assert held(bucket) == {}


def test_of_a_checkpoint_that_is_being_removed_nothing_is_sent(bucket, monkeypatch):
    with mirrored() as path:
        write(path / "runs/checkpoints/10/params/p", "10")
        write(path / "runs/checkpoints/10/digests.json", "10")
        write(path / "metrics.jsonl", "1")
        link = os.link

        def removed_meanwhile(source: pathlib.Path, target: pathlib.Path) -> None:
            if source.name == "p":
                raise FileNotFoundError(source)
            link(source, target)

        monkeypatch.setattr(os, "link", removed_meanwhile)
    assert held(bucket) == {"metrics.jsonl": "1"}


def write_and_lose() -> None:
    """A run at whose end the bucket does not take all."""
    with mirrored() as path:
        write(path / "a", "2")
        write(path / "checkpoints/10/digests.json", "10")
        write(path / "new", "2")
        (path / "old").unlink()


def test_a_bucket_that_fails_at_the_end_fails_the_run_and_loses_nothing(bucket):
    with mirrored() as path:
        write(path / "a", "1")
        write(path / "old", "1")
    bucket.failing_names = {f"{PLACE}/checkpoints/10/digests.json"}
    with pytest.raises(RunFailed, match=r"cannot be written.*run the same command"):
        write_and_lose()
    assert held(bucket) == {"a": "2", "new": "2", "old": "1"}
    bucket.failing_names = set()
    with mirrored():
        pass
    assert held(bucket) == {"a": "2", "new": "2", "checkpoints/10/digests.json": "10"}


def test_a_bucket_that_fails_for_a_while_is_told_of_once(bucket, monkeypatch, capfd):
    monkeypatch.setenv("SALT_SEND_SECONDS", "0.01")
    bucket.failing = {"write"}
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
        assert bucket.wait_for_call(2)
        bucket.failing = set()
        assert bucket.wait_for(f"{PLACE}/metrics.jsonl")
    assert capfd.readouterr().err.count("It will be tried again") == 1


def test_two_commands_at_once_are_refused(bucket):
    with mirrored(), pytest.raises(InputError, match="being written by another"), mirrored():
        pass


def test_seconds_that_are_none(bucket, monkeypatch):
    monkeypatch.setenv("SALT_SEND_SECONDS", "often")
    with pytest.raises(InputError, match="SALT_SEND_SECONDS is 'often'"), mirrored():
        pass
