"""Two real processes whose output is in a bucket, and what they read there."""

import json
import pathlib

import pytest

from salt_jax.data.packed_cache import PackedCache
from tests.bucket_emulator import BucketEmulator
from tests.training.several_processes_test import Together, _none_is_left, run  # noqa: F401

pytestmark = pytest.mark.slow
pytest.importorskip("gcsfs")
pytest.importorskip("s3fs")


def test_the_first_mirrors_what_is_evaluated_together(
    cache: PackedCache, slm: pathlib.Path, bucket: BucketEmulator
) -> None:
    """The others read the bucket, and so refuse what the first one refuses."""
    flags = ["evaluate", f"--model={slm}", f"--cache={cache.path}", "--compilation_cache="]
    flags += ["--batch_size=8", "--output_dir=s3://bucket/evaluated"]
    run(2, 1, flags)
    assert 0 < json.loads(bucket.objects["bucket/evaluated/summary.json"])["log_perplexity"] < 10
    for code, text in Together(2, 1, [*flags, "--split=validation"]).end():
        assert code == 2, text
        assert "holds a run with another configuration: " in text
    flags = ["score", f"--scorer={slm}", f"--cache={cache.path}", "--output_dir=s3://bucket/scores"]
    for code, text in Together(2, 1, flags).end():
        assert code == 2, text
        assert "each process of `salt score` writes a part, which it can't to s3://" in text
