"""Eight virtual CPU devices, but not in what tests start; accidental broadcasts are errors.

Programs are compiled the quick way, there too: they are run a few times only.
"""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import jax
import numpy as np
import pytest

from salt_jax.data import features
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import SUBSET, TARGETS_HASH, RowScores, RowScoresWriter
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill.scores import column_names
from salt_jax.training.compilation import use_compilation_cache
from tests.bucket_emulator import BucketEmulator
from tests.written_cache import write_rows

# Below nohup, or in a shell's background, they are ignored, and so in all that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# PyTorch imports it, for GPUs; after TensorFlow that ends the process.
sys.modules["triton"] = None  # type: ignore[assignment]
# Many tests compile the same small programs, and compiling is most of what they do.
_programs = tempfile.TemporaryDirectory(prefix="salt_jax_programs_")
use_compilation_cache(_programs.name)

LENGTH = 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a part of every test file, no slow test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the quick tier: no slow tests, and of a parametrized one the first case alone."""
    if not config.getoption("--quick"):
        return
    lines = pathlib.Path(__file__).with_name("not_quick.txt").read_text(encoding="utf-8")
    seen = {line for line in lines.splitlines() if line[0] != "#"}
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        is_quick = item.get_closest_marker("slow") is None and name not in seen
        seen.add(name)
        (kept if is_quick else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture
def failed_tasks_are_collected() -> Iterator[None]:
    """For saves that fail: asyncio reports a task's error when the task is collected, and Python
    3.11 raises SystemError if that is while it parses a file."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def make_cache(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., PackedCache]:
    """Makes caches of learnable byte rows: words of a few letters, one or two segments a row."""

    def make(rows: int = 48, length: int = LENGTH, reserved: int = 0, seed: int = 0) -> PackedCache:
        folder = tmp_path_factory.mktemp("cache")
        return write_cache(folder, rows, length, reserved, seed)

    return make


@pytest.fixture(scope="session")
def cache(make_cache: Callable[..., PackedCache]) -> PackedCache:
    """A small cache with train, validation and test splits and two subsets."""
    return make_cache()


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs of a file's tests go with it: all tests' take 10 GB."""
    yield
    jax.clear_caches()


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketEmulator]:
    """Buckets on this machine, which gs:// and s3:// stand for, in child processes too."""
    with BucketEmulator() as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", emulator.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        monkeypatch.setenv("AWS_ENDPOINT_URL", emulator.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-example-of-a-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        monkeypatch.setenv("SALT_LOCAL_COPIES", str(tmp_path / "copies"))
        yield emulator
    for scheme, library in {"gs": "gcsfs", "s3": "s3fs"}.items():
        if library in sys.modules:  # its objects remember the server's port
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(scope="session")
def write_scores() -> Callable[..., RowScores]:
    """Writes scores given by hand: the medians of every k; other columns may be given too."""

    def write(
        folder: pathlib.Path,
        scores_N: np.ndarray,
        *,
        cache_digest: str,
        split: str = "train",
        ks: tuple[int, ...] = (10,),
        shard_rows: int = 7,
        cost: dict[str, Any] | None = None,
        scorer: dict[str, Any] | None = None,
        columns: dict[str, np.ndarray] | None = None,
    ) -> RowScores:
        scores_N = np.asarray(scores_N, np.float32)
        names = column_names(ks)
        every = {
            **dict.fromkeys(names, scores_N),
            **{name: np.ones_like(scores_N) for name in names if name.startswith("learnable")},
            SUBSET: np.zeros(len(scores_N), np.uint16),
            TARGETS_HASH: np.arange(len(scores_N), dtype=np.uint64),
            **(columns or {}),
        }
        writer = RowScoresWriter(
            folder,
            cache_digest=cache_digest,
            split=split,
            rows=len(scores_N),
            scorer=scorer or {"path": "slm", "step": 100, "digest": "d" * 64},
            ks=ks,
            columns=names,
            shard_rows=shard_rows,
        )
        writer.begin()
        for shard in writer.unfinished():
            part = slice(shard.rows.start, shard.rows.stop)
            columns_n = {name: values[part] for name, values in every.items()}
            writer.write(shard, columns_n, {"seconds": 1.0, "workers": 1})
        return writer.complete(cost)

    return write


def write_cache(
    folder: pathlib.Path, rows: int, length: int, reserved: int, seed: int
) -> PackedCache:
    vocabulary = ByteVocabulary(reserved=reserved)
    rng = np.random.default_rng(seed)
    words = [vocabulary.encode(word) for word in ("salt ", "teaches ", "small ", "models ")]

    def row() -> features.Row:
        stream = np.concatenate([words[i] for i in rng.integers(len(words), size=length)])
        cut = int(rng.integers(1, length))
        weights = np.ones(length, np.float32)
        weights[0] = 0.0
        segments = np.where(np.arange(length) < cut, 1, 2)
        return features.make_row(stream[:length], weights, segments, int(rng.integers(2)))

    counts = {"train": rows, "validation": 10, "test": 6}
    made = {split: [row() for _ in range(count)] for split, count in counts.items()}
    fields = {"sequence_length": length, "subsets": ("prose", "code"), "shards": 2}
    write_rows(folder, made, vocabulary=vocabulary, **fields)
    return PackedCache.open(folder)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A disk of 16 KB, for real: a memory file system."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root on Linux")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.fixture
def libtpu() -> None:
    """Skips a test that compiles for TPUs where that cannot be done."""
    pytest.importorskip("libtpu", reason="it is not installed: pip install 'salt_jax[plan]'")
