"""Real processes: killed, asked to stop, started again, moved; the parameters must not know."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.training.checkpoint_digests import COMMIT_MARK
from salt_jax.training.checkpoints import complete_steps, find_model
from salt_jax.training.partitioning import MeshConfig
from tests.bucket_emulator import BucketEmulator

STEPS = 60


def command(cache: PackedCache, slm: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [
        *(sys.executable, "-m", "salt_jax", "train", "--gin_file=runs/pretrain.gin"),
        *("--gin_file=methods/salt.gin", "--gin_file=hardware/cpu.gin"),
        *(f"--cache={cache.path}", f"--teacher={slm}", f"--gin.N_KD={STEPS // 2}"),
        *(f"--steps={STEPS}", "--batch_size=8", "--log_every=1"),
        f"--compilation_cache={slm / 'programs'}",
        *(
            "--gin.LEARNING_RATE=3e-3",
            "--gin.SAVE_EVERY=5",
            "--gin.decoder.DecoderConfig.mlp_dim=64",
        ),
        *("--gin.decoder.DecoderConfig.embed_dim=32", "--gin.decoder.DecoderConfig.num_layers=2"),
        *("--gin.decoder.DecoderConfig.num_heads=2", f"--output_dir={output}"),
    ]


def start(arguments: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_by(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.read()


def last_step(output: pathlib.Path) -> int:
    """Of a run's metrics; 0 before the first."""
    metrics = output / "metrics.jsonl"
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return int(json.loads(whole.splitlines()[-1])["step"]) if whole else 0


def params_of(run: pathlib.Path) -> list[np.ndarray]:
    model = find_model(run, None, "model")
    assert model.step == STEPS
    mesh = MeshConfig(fsdp=1).make(jax.devices()[:1])
    return [np.asarray(p) for p in jax.tree.leaves(model.load_params(mesh))]


@pytest.fixture(scope="module")
def straight(
    cache: PackedCache, slm: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    output = tmp_path_factory.mktemp("straight")
    process = start(command(cache, slm, output))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return output


def test_killed_at_the_worst_moments_ends_with_the_same_parameters(
    cache: PackedCache, slm: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """benchmarks/soak.py kills at any other."""
    output, programs = tmp_path / "run", tmp_path / "programs"
    typed = [*command(cache, slm, output), f"--compilation_cache={programs}"]
    moments: dict[str, Callable[[], bool]] = {
        "it has said what it will do": lambda: (output / "run.json").exists(),
        "the second program compiles": lambda: any(programs.glob("*")),
        "a checkpoint is written": lambda: any(output.glob("checkpoints/*.orbax-checkpoint-tmp*")),
        "it is at the switch": lambda: last_step(output) >= STEPS // 2,
        "it is at a step of stage 2": lambda: last_step(output) >= STEPS // 2 + 10,
    }
    for moment, has_come in moments.items():
        process = start(typed)
        while not has_come():
            assert process.poll() is None, f"it ended before {moment}: {said_by(process)}"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = start(typed)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    for a, b in zip(params_of(output), params_of(straight), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_exits_75(
    cache: PackedCache,
    slm: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    number: signal.Signals,
) -> None:
    process = start(command(cache, slm, tmp_path))
    while last_step(tmp_path) < 7:
        assert process.poll() is None, said_by(process)
    process.send_signal(number)
    text, _ = process.communicate()
    assert process.returncode == 75, text
    assert f"stopped by {number.name} after step" in text
    assert "run the same command again" in text
    stopped = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert 7 <= stopped < STEPS
    process = start(command(cache, slm, tmp_path))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert f"continues at step {stopped}" in text
    for a, b in zip(params_of(tmp_path), params_of(straight), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gcsfs", "s3fs")),
    reason="gcsfs or s3fs is not installed",
)
def test_with_all_in_buckets_another_machine_goes_on(
    cache: PackedCache,
    slm: pathlib.Path,
    straight: pathlib.Path,
    bucket: BucketEmulator,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.take(cache.path, "bucket/cache")
    bucket.take(slm, "bucket/slm")
    moved = {
        f"--cache={cache.path}": "--cache=gs://bucket/cache",
        f"--teacher={slm}": "--teacher=s3://bucket/slm",
        f"--output_dir={tmp_path}": "--output_dir=gs://bucket/runs/salt",
    }
    typed = [moved.get(argument, argument) for argument in command(cache, slm, tmp_path)]
    monkeypatch.setenv("SALT_SEND_SECONDS", "0.05")
    lost = start(typed)
    assert bucket.wait_for(rf"bucket/runs/salt/checkpoints/\d+/{COMMIT_MARK}")
    lost.kill()
    lost.communicate()
    monkeypatch.setenv("SALT_LOCAL_COPIES", str(tmp_path / "another machine"))
    process = start(typed)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "continues at step" in text
    output = tmp_path / "taken"
    for name in bucket.names("bucket/runs/salt"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(bucket.objects[f"bucket/runs/salt/{name}"])
    for a, b in zip(params_of(output), params_of(straight), strict=True):
        np.testing.assert_array_equal(a, b)
    assert complete_steps(output) == complete_steps(straight)
    assert {path.name for path in output.iterdir()} == {path.name for path in straight.iterdir()}
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in text
    assert not [name for name, content in bucket.objects.items() if secret.encode() in content]
