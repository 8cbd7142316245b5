"""Output folders in a bucket: what is sent, what is taken, and what a kill or a network costs."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest

from salt_jax.errors import InputError, RunFailed
from salt_jax.mirror import Mirror
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
    with Mirror(url, "train") as path:
        yield path


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def held(bucket: BucketEmulator) -> dict[str, str]:
    return {name: bucket.objects[f"{PLACE}/{name}"].decode() for name in bucket.names(PLACE)}


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, name: str) -> None:
    monkeypatch.setenv("SALT_LOCAL_COPIES", str(tmp_path / name))


def test_what_is_complete_is_sent_and_the_rest_stays(bucket):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
        write(path / "checkpoints/10/params/p", "p")
        write(path / "checkpoints/20.orbax-checkpoint-tmp-3/params/p", "half")
        write(path / "summary.json.0123abcd.tmp", "half")
        write(path / "processes/0.json", "beat")
        write(path / "work/part-0", "part")
    assert held(bucket) == {"metrics.jsonl": "1", "checkpoints/10/params/p": "p"}


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


def test_what_a_kill_left_unsent_is_sent_by_the_same_machine(bucket):
    with mirrored() as path:
        write(path / "metrics.jsonl", "1")
    write(path / "metrics.jsonl", "2")  # of the same size
    write(path / "new", "new")
    with mirrored() as path:
        assert (path / "metrics.jsonl").read_text() == "2"
    assert held(bucket) == {"metrics.jsonl": "2", "new": "new"}


def test_what_another_machine_wrote_since_counts(bucket, monkeypatch, tmp_path):
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


def test_a_checkpoint_that_was_sent_in_part_goes(bucket):
    bucket.store(f"{PLACE}/checkpoints/10/params/p", b"10")
    bucket.store(f"{PLACE}/checkpoints/10/digests.json", b"10")
    bucket.store(f"{PLACE}/checkpoints/20/params/half", b"20")
    with mirrored() as path:
        assert [p.name for p in (path / "checkpoints").iterdir()] == ["10"]
    assert bucket.names(f"{PLACE}/checkpoints") == {"10/params/p", "10/digests.json"}


def test_a_checkpoint_that_is_removed_while_it_is_sent_arrives_and_goes(bucket):
    mirror = Mirror(URL, "train")
    put = mirror._folder.put

    def removed_meanwhile(folder: pathlib.Path, names: list[str]) -> None:
        shutil.rmtree(mirror.path / "checkpoints")
        put(folder, names)

    with mirror as path:
        for name in ("params/p", "digests.json"):
            write(path / "checkpoints/10" / name, "10")
        mirror._folder.put = removed_meanwhile
        mirror._send()
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
    assert capfd.readouterr().err.count("It is tried again") == 1


def test_two_commands_at_once_are_refused(bucket):
    with mirrored(), pytest.raises(InputError, match="being written by another"), mirrored():
        pass


def test_seconds_that_are_none(bucket, monkeypatch):
    monkeypatch.setenv("SALT_SEND_SECONDS", "often")
    with pytest.raises(InputError, match="SALT_SEND_SECONDS is 'often'"), mirrored():
        pass
