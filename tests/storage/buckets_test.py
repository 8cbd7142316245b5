"""Folders in buckets, against a server on this machine that speaks as both stores do."""

import asyncio
import importlib.util
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.storage import buckets, local_copies
from salt_jax.storage.buckets import BucketError, RemoteFolder, matching
from salt_jax.storage.local_copies import local_file, local_folder, local_run, remote_steps
from tests.bucket_emulator import BucketEmulator
from tests.bucket_store import CUT

LARGE = random.Random(0).randbytes(12 * 2**20 + 1)
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture(params=["gs", "s3"])
def url(request: pytest.FixtureRequest, bucket: BucketEmulator) -> str:
    """Of the folder a/b of a bucket in which other things lie too."""
    if importlib.util.find_spec({"gs": "gcsfs", "s3": "s3fs"}[request.param]) is None:
        pytest.skip(f"nothing is installed that reads {request.param}://")
    for name in ("other/b/x", "a/bc", "a/b"):
        bucket.objects[f"bucket/{name}"] = b"not of the folder"
    return f"{request.param}://bucket/a/b"


def test_what_is_put_is_listed_and_fetched(url, bucket, tmp_path):
    folder, content = (
        RemoteFolder(url),
        {"x": b"1", "d/e f+%/ü.bin": bytes(range(256)), "empty": b""},
    )
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert folder.files() == {}
    folder.put(tmp_path, list(content))
    assert {n: bucket.objects[f"bucket/a/b/{n}"] for n in bucket.names("bucket/a/b")} == content
    assert {name: file.bytes for name, file in folder.files().items()} == {
        name: len(data) for name, data in content.items()
    }
    folder.fetch(tmp_path / "back", list(content))
    assert {name: (tmp_path / "back" / name).read_bytes() for name in content} == content
    folder.remove([*content, "never there"])
    assert folder.files() == {}
    assert "bucket/a/bc" in bucket.objects


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are the smallest that S3 takes: LARGE has three."""
    monkeypatch.setattr(buckets, "_PART_BYTES", 5 * 2**20)


@pytest.fixture
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is so at once."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, result=None: sleep(0, result))


def test_a_large_file_is_sent_in_parts(url, bucket, tmp_path, small_parts):
    (tmp_path / "large").write_bytes(LARGE)
    folder = RemoteFolder(url)
    folder.put(tmp_path, ["large"])
    assert bucket.objects["bucket/a/b/large"] == LARGE
    assert (bucket.asked["begin"], bucket.asked["part"], bucket.asked["write"]) == (1, 3, 0)
    assert bucket.changed == [("write", "bucket/a/b/large")]
    there = folder.files()["large"]
    assert there.bytes == len(LARGE)
    assert there.version.endswith('-3"') or url.startswith("gs")
    folder.fetch(tmp_path / "back", ["large"])
    assert (tmp_path / "back/large").read_bytes() == LARGE


def test_a_large_file_whose_connection_is_lost_twice_is_read_on(
    url, bucket, tmp_path, without_waiting
):
    content = np.arange(26 * 2**20, dtype=np.int32).tobytes()  # gcsfs reads 100 MiB in parallel
    bucket.store("bucket/a/b/large", content)
    bucket.answers["read"] = [CUT, CUT]
    RemoteFolder(url).fetch(tmp_path, ["large"])
    assert (tmp_path / "large").read_bytes() == content
    assert bucket.asked["read"] > 2


@pytest.mark.parametrize("answer", [403, 500, CUT])
def test_a_part_that_fails_leaves_the_object_as_it_was(
    url, bucket, tmp_path, small_parts, without_waiting, answer, caplog
):
    bucket.store("bucket/a/b/large", b"old")
    (tmp_path / "large").write_bytes(LARGE)
    folder = RemoteFolder(url)
    bucket.answers["part"] = [None, *[answer] * 1000]
    with pytest.raises(BucketError, match=f"^{url} cannot be written .*: check the name"):
        folder.put(tmp_path, ["large"])
    assert bucket.asked["part"] > 1
    assert bucket.objects["bucket/a/b/large"] == b"old"
    assert not bucket.uploads  # given up, and not left for the bucket's owner to pay for
    assert not [record for record in caplog.records if record.name == "gcsfs"]
    bucket.answers.clear()
    folder.put(tmp_path, ["large"])
    assert bucket.objects["bucket/a/b/large"] == LARGE


SENDER = """
import pathlib, sys
from salt_jax.storage import buckets
buckets._PART_BYTES = 5 * 2**20
buckets.RemoteFolder(sys.argv[1]).put(pathlib.Path(sys.argv[2]), ["large"])
"""


def test_a_sender_killed_between_parts_leaves_no_object(url, bucket, tmp_path, small_parts):
    (tmp_path / "large").write_bytes(LARGE)
    senders: list[subprocess.Popen[bytes]] = []
    bucket.answers["part"] = [None, lambda: senders[0].kill()]
    senders.append(subprocess.Popen([sys.executable, "-c", SENDER, url, str(tmp_path)]))
    assert senders[0].wait() == -signal.SIGKILL
    assert bucket.asked["part"] >= 2
    folder = RemoteFolder(url)
    assert folder.files() == {}
    folder.put(tmp_path, ["large"])
    assert bucket.objects["bucket/a/b/large"] == LARGE


@pytest.mark.parametrize("answer", [429, 500, 503, CUT])
def test_answers_of_a_busy_bucket_are_waited_out(
    url, bucket, tmp_path, small_parts, without_waiting, answer
):
    if answer == 429 and url.startswith("s3"):
        pytest.skip("S3 says 503 instead")
    content = {"large": LARGE, "small": b"small"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    kinds = ("begin", "part", "complete", "write", "list", "read", "delete")
    bucket.answers = {kind: [answer] * 2 for kind in kinds}
    folder = RemoteFolder(url)
    folder.put(tmp_path, list(content))
    assert {n: bucket.objects[f"bucket/a/b/{n}"] for n in bucket.names("bucket/a/b")} == content
    assert set(folder.files()) == set(content)
    folder.fetch(tmp_path / "back", list(content))
    assert {name: (tmp_path / "back" / name).read_bytes() for name in content} == content
    folder.remove(content)
    assert not bucket.names("bucket/a/b")
    assert not any(bucket.answers[kind] for kind in kinds if bucket.asked[kind])


def test_a_folder_of_several_pages(url, bucket):
    bucket.page = 3
    names = {f"{folder}x{number}" for folder in ("", "d/", "d/e f/") for number in range(5)}
    for name in names:
        bucket.store(f"bucket/a/b/{name}", name.encode())
    assert set(RemoteFolder(url).files()) == names
    assert bucket.asked["list"] >= 5
    assert len(matching(f"{url}/**/x*")) == len(names)
    assert len(matching(f"{url}/x*")) == 5
    path = local_folder(url)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("x*")}
    assert {name: file.read_text() for name, file in files.items()} == {n: n for n in names}


def test_signs_that_are_part_of_a_name(url, bucket):
    names = ["corpus [v2]/a.jsonl", "corpus [v2]/in/b[1].jsonl", "base[1].jsonl", "what?.jsonl"]
    for name in [*names, "corpus v/other.jsonl", "base1.jsonl", "what1.jsonl"]:
        bucket.store(f"bucket/a/b/{name}", b"x")

    def found(pattern: str) -> list[str]:
        return [name.removeprefix(f"{url}/") for name in matching(f"{url}/{pattern}")]

    assert found("corpus [v2]/*.jsonl") == names[:1]
    assert found("corpus [v2]/**/*.jsonl") == names[:2]
    assert found("corpus [v2]/in/b[0-9].jsonl") == []
    assert found("corpus [v2]/in/b[[][0-9]].jsonl") == names[1:2]
    assert found("corpus [v2]/a.jsonl") == names[:1]
    assert found("base[1].jsonl") == names[2:3]
    assert found("what?.jsonl") == names[3:4]
    assert found("base[0-9].jsonl") == ["base1.jsonl"]


def test_memory_is_bounded_by_few_files_at_once(url, bucket, tmp_path, monkeypatch):
    names = [str(number) for number in range(40)]
    for name in names:
        (tmp_path / name).write_text(name)
    folder = RemoteFolder(url)
    most: dict[str, int] = {}

    def counted(kind: str) -> Callable[..., Awaitable[None]]:
        function, running = getattr(folder._files, kind), 0

        async def call(*given: Any, **settings: Any) -> None:
            nonlocal running
            running += 1
            most[kind] = max(running, most.get(kind, 0))
            await function(*given, **settings)
            running -= 1

        return call

    for kind in ("_put_file", "_get_file"):
        monkeypatch.setattr(folder._files, kind, counted(kind))
    folder.put(tmp_path, names)
    folder.fetch(tmp_path / "back", names)
    assert most == {"_put_file": 16, "_get_file": 16}


def test_the_largest_files_have_no_more_parts_than_s3_takes():
    for size in (1, 10**9, 10_000 * 2**23 + 1, 5 * 10**12):
        part = buckets._part_bytes(size)
        assert part % 2**18 == 0
        assert -(-size // part) <= 10_000
    assert buckets._part_bytes(10**9) == 2**23


@pytest.mark.parametrize("name", ["../out", "d/../../out", "..", "d/.."])
def test_names_that_lead_out_of_a_copy_are_refused(name, url, bucket):
    bucket.objects[f"bucket/a/b/{name}"] = b"of anyone"
    with pytest.raises(InputError, match="expected one inside the folder: rename or remove"):
        RemoteFolder(url).files()


def test_marks_of_completeness_come_last_and_go_first(url, bucket, tmp_path):
    names = ["COMPLETED", "a", "checkpoints/1/digests.json", "checkpoints/1/params/p", "z"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    folder = RemoteFolder(url)
    folder.put(tmp_path, names)
    written = [name.removeprefix("bucket/a/b/") for _, name in bucket.changed]
    marks = {"COMPLETED", "checkpoints/1/digests.json"}
    assert set(written[:3]) == set(names) - marks
    assert set(written[3:]) == marks
    bucket.failing = {"delete"}
    with pytest.raises(BucketError):
        folder.remove(names)
    kind, name = bucket.changed[5]
    assert kind == "delete"
    assert name.removeprefix("bucket/a/b/") in marks


def test_a_copy_fetches_only_what_changed(url, bucket):
    for name in ("x", "y", "z"):
        bucket.store(f"bucket/a/b/{name}", name.encode())
    path = local_folder(url)
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "x": "x",
        "y": "y",
        "z": "z",
    }
    reads = bucket.asked["read"]
    assert local_folder(f"{url}/") == path
    assert bucket.asked["read"] == reads
    bucket.store("bucket/a/b/y", b"Y")
    del bucket.objects["bucket/a/b/z"]
    (path / "x").write_text("damaged")
    local_folder(url)
    assert {file.name: file.read_text() for file in path.iterdir()} == {"x": "x", "y": "Y"}
    assert bucket.asked["read"] == reads + 2


def test_a_copy_that_fails_half_way_is_finished_later(url, bucket):
    for name in ("COMPLETED", "x"):
        bucket.store(f"bucket/a/b/{name}", name.encode())
    bucket.failing = {"read"}
    with pytest.raises(BucketError, match=f"{url} cannot be read.*permissions"):
        local_folder(url)
    bucket.failing = set()
    assert (local_folder(url) / "x").read_text() == "x"


def test_objects_that_stand_for_folders_are_passed_over(url, bucket):
    for name in ("a/b/", "a/b/sub/", "a/b/sub/x"):
        bucket.store(f"bucket/{name}", b"")
    assert set(RemoteFolder(url).files()) == {"sub/x"}
    assert (local_folder(url) / "sub/x").exists()


@pytest.mark.parametrize("names", [("x", "x/y"), ("x//y",)])
def test_objects_that_cannot_be_files_together(url, bucket, names):
    for name in names:
        bucket.store(f"bucket/a/b/{name}", b"1")
    with pytest.raises(InputError, match="can't be a file beside its others"):
        local_folder(url)


def test_one_file(url, bucket):
    bucket.store("bucket/a/b/prompts.txt", b"hello\n")
    bucket.store("bucket/a/b/large", b"0" * 100)
    path = local_file(f"{url}/prompts.txt")
    assert path.read_text() == "hello\n"
    assert not (path.parent / "large").exists()
    with pytest.raises(InputError, match=r"no file .*a/b/nothing"):
        local_file(f"{url}/nothing")


def test_of_a_run_one_checkpoint_is_copied(url, bucket):
    for step in (5, 10, 15):
        for name in ("params/p", "digests.json"):
            bucket.store(f"bucket/a/b/checkpoints/{step}/{name}", str(step).encode())
    del bucket.objects["bucket/a/b/checkpoints/15/digests.json"]  # half-sent
    bucket.store("bucket/a/b/metrics.jsonl", b"{}\n")
    assert remote_steps(RemoteFolder(url).files()) == [5, 10]
    path = local_run(url, 10)
    assert (path / "metrics.jsonl").exists()
    if url.startswith("gs://"):
        assert not (path / "checkpoints").exists()  # Orbax reads them
        return
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["10"]
    local_run(url, 5)
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"5", "10"}
    for name in [name for name in bucket.objects if "/10/" in name]:
        del bucket.objects[name]
    local_run(url, 5)
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"5"}  # no empty folder either


def test_an_empty_folder_is_refused(url):
    with pytest.raises(InputError, match=r"nothing in .*a/b/none"):
        local_folder(f"{url}/none")


def test_no_room_is_told_before_copying(url, bucket, monkeypatch):
    bucket.store("bucket/a/b/x", b"0" * 5000)
    monkeypatch.setattr(
        local_copies.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4999})
    )
    with pytest.raises(InputError, match="SALT_LOCAL_COPIES"):
        local_folder(url)
    assert bucket.asked["read"] == 0


def test_a_path_on_the_disk_stays_what_it_is():
    assert local_folder("runs/a") == pathlib.Path("runs/a")
    assert local_file("prompts.txt") == pathlib.Path("prompts.txt")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ftp://host/x", "ftp:// is not supported"),
        ("gs://bucket", "write gs://BUCKET/FOLDER"),
        ("gs://", "write gs://BUCKET/FOLDER"),
        ("s3://bucket/../x", "names no folder"),
        (f"s3://id:{SECRET}@bucket/x", "give credentials as gcloud"),
        (f"s3://bucket/x?X-Amz-Signature={SECRET}", "give credentials as gcloud"),
    ],
)
def test_paths_that_name_no_folder(given, said):
    with pytest.raises(InputError, match=said) as caught:
        local_folder(given)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("words", ["signature", "signature " + "x" * 185])  # cut within it
def test_credentials_are_in_no_sentence(url, bucket, monkeypatch, words):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    folder = RemoteFolder(url)

    def fail(*_: object, **__: object) -> None:
        raise OSError(f"{words} {SECRET} does not match")

    monkeypatch.setattr(folder._files, "find", fail)
    with pytest.raises(BucketError, match="signature") as caught:
        folder.files()
    assert "…" in str(caught.value)
    assert SECRET[:4] not in str(caught.value)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    import fsspec

    def missing(scheme: str, **options: Any) -> None:
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=r"pip install 'salt_jax\[gcs\]'"):
        RemoteFolder("gs://bucket/x")
