"""A disk that is full, for real: a memory file system of a few kilobytes."""

import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.main import main

BASELINE = [
    *("train", "--gin_file=runs/smoke_llm.gin", "--gin_file=methods/baseline.gin", "--steps=3"),
]


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root on Linux")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_train_refuses_before_it_writes(
    small_disk: pathlib.Path, cache: PackedCache, capsys: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "out"
    assert main([*BASELINE, f"--cache={cache.path}", f"--output_dir={output}"]) == 2
    error = capsys.readouterr().err
    assert "MB free, and 2 checkpoints need" in error
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("left", [0, 4096])
def test_select_says_so(
    small_disk: pathlib.Path, cache: PackedCache, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    (small_disk / "filler").write_bytes(b"x" * (16384 - left))
    output = small_disk / "out"
    arguments = [f"--cache={cache.path}", "--gin_file=methods/random_rows.gin", "--gin.ROWS=48"]
    assert main(["select", *arguments, f"--output_dir={output}"]) == 2
    error = capsys.readouterr().err
    assert "o space left" in error
    assert error.count("\n") == 1
    assert not (output / "COMPLETED").exists()
