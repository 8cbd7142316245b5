"""Two real processes whose output is in a bucket, and what they read there."""

import json
import pathlib
import re

import pytest

from salt_jax.data.packed_cache import PackedCache
from tests.bucket_emulator import BucketEmulator
from tests.training.monitoring_test import profiled_steps
from tests.training.several_processes_test import (
    Together,
    _none_is_left,  # noqa: F401 (a fixture)
    run,
    training,
)

pytestmark = pytest.mark.slow
pytest.importorskip("gcsfs")
pytest.importorskip("s3fs")

_TENSORSTORE_READ = re.compile(r"(\S+)\?alt=media&tensorstore=.*bytes=(\d+)-(\d+)")


def test_the_first_mirrors_what_is_evaluated_together(
    cache: PackedCache, slm: pathlib.Path, bucket: BucketEmulator
) -> None:
    """The others read the bucket, and so refuse what the first one refuses. Of two replicas of the
    model the first reads it."""
    bucket.take(slm, "bucket/slm")
    flags = ["evaluate", "--model=gs://bucket/slm", f"--cache={cache.path}", "--mesh.data=2"]
    flags += ["--compilation_cache=", "--batch_size=8", "--output_dir=s3://bucket/evaluated"]
    run(2, 1, flags)
    read = [
        (name, byte)
        for asked in bucket.seen
        for name, first, last in _TENSORSTORE_READ.findall(asked)
        for byte in range(int(first), int(last) + 1)
    ]
    # TensorStore joins reads that come together, so that two ranges may overlap a little.
    assert 0 < len(read) < 1.5 * len({*read})
    assert 0 < json.loads(bucket.objects["bucket/evaluated/summary.json"])["log_perplexity"] < 10
    for code, text in Together(2, 1, [*flags, "--split=validation"]).end():
        assert code == 2, text
        assert "holds a run with another configuration: " in text
    bucket.failing = {"list"}
    for code, text in Together(2, 1, flags).end():
        assert code == 2, text
        assert "s3://bucket/evaluated cannot be read" in text
    flags = ["score", f"--scorer={slm}", f"--cache={cache.path}", "--output_dir=s3://bucket/scores"]
    for code, text in Together(2, 1, flags).end():
        assert code == 2, text
        assert "each process of `salt score` writes a part, which it can't to s3://" in text


def test_a_profile_of_each_and_the_newest_teacher(
    cache: PackedCache, slm: pathlib.Path, bucket: BucketEmulator, tmp_path: pathlib.Path
) -> None:
    bucket.take(slm, "bucket/slm")
    typed = training(cache, slm, tmp_path, steps=4)
    typed[typed.index(f"--teacher={slm}")] = "--teacher=gs://bucket/slm"
    run(2, 1, [*typed[:-1], "--profile_steps=2:3", "--output_dir=gs://bucket/run"])
    assert json.loads(bucket.objects["bucket/run/summary.json"])["teacher"]["step"] == 12
    for name in bucket.names("bucket/run/profile"):
        process, _, file = name.rpartition("/")[2].partition(".")
        there = tmp_path / process / "profile/plugins/profile/steps_2_3" / file
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(bucket.objects[f"bucket/run/profile/{name}"])
    for process in (0, 1):
        assert profiled_steps(tmp_path / f"process_{process}", "steps_2_3") == {2, 3}
