"""A disk that is full, for real: a memory file system of a few kilobytes."""

import contextlib
import json
import pathlib
import subprocess
from typing import Any

import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.training.metrics import MetricWriter

pytestmark = pytest.mark.usefixtures("failed_tasks_are_collected")

BASELINE = [
    *("train", "--gin_file=runs/smoke_llm.gin", "--gin_file=methods/baseline.gin", "--steps=3"),
]


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


def _corpus(folder: pathlib.Path, documents: int) -> pathlib.Path:
    folder.mkdir()
    for number in range(4):
        texts = [f"{number} {index} " * 20 for index in range(documents)]
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    return folder


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kilobytes", [300, 800])  # full while mapping, and while merging
def test_prepare_keeps_what_is_whole_and_goes_on(
    small_disk: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
    kilobytes: int,
) -> None:
    corpus = _corpus(tmp_path_factory.mktemp("text") / "corpus", 500)
    monkeypatch.setattr("salt_jax.preparation.corpora._UNIT_TEXT_BYTES", 1)
    remount = ["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)]
    subprocess.run(remount, check=True)
    # The disk has less than it says: the check beforehand is passed.
    usage = type("Usage", (), {"free": 10**12})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    output = small_disk / "out"
    command = ["prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{corpus}/*'"]
    command += [f"--workers={workers}", "--shards=3", "--gin.VOCABULARY_SIZE=300"]
    assert main([*command, f"--output_dir={output}"]) == 2
    error = capsys.readouterr().err
    assert "o space left" in error
    assert error.count("\n") == 1
    with pytest.raises(InputError):
        PackedCache.open(output)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert main([*command, f"--output_dir={output}"]) == 0
    assert "are finished" in capsys.readouterr().out
    assert not (output / "work").exists()
    assert main([*command, f"--output_dir={small_disk / 'straight'}"]) == 0
    assert PackedCache.open(output).digest == PackedCache.open(small_disk / "straight").digest


def test_events_alone_may_run_out_of_space(
    small_disk: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """metrics.jsonl may have room in its last block where the events have none."""
    elsewhere = tmp_path_factory.mktemp("roomy") / "metrics.jsonl"
    elsewhere.touch()
    (small_disk / "metrics.jsonl").symlink_to(elsewhere)
    with MetricWriter(small_disk) as writer:
        with contextlib.suppress(OSError), (small_disk / "filler").open("ab", 0) as filler:
            while True:
                filler.write(bytes(4096))
        for step in range(500):
            writer.write({"kind": "train", "step": step, "loss": 1.0})
    assert len(elsewhere.read_text().splitlines()) == 500
    assert capsys.readouterr().err.count("events are no longer written") == 1


def test_training_goes_on_and_keeps_its_old_checkpoints(
    small_disk: pathlib.Path,
    cache: PackedCache,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    remount = ["mount", "-o", "remount,size=60m", str(small_disk)]
    subprocess.run(remount, check=True)
    output, filler = small_disk / "out", small_disk / "filler"
    arguments = [*BASELINE[:-1], "--steps=12", "--gin.SAVE_EVERY=2", "--compilation_cache="]
    arguments += ["--log_every=1", f"--cache={cache.path}", f"--output_dir={output}"]
    write = MetricWriter.write

    def write_on_a_full_disk(self: MetricWriter, record: dict[str, Any]) -> None:
        if record["step"] >= 5:  # again, since old checkpoints leave room when they go
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        write(self, record)

    monkeypatch.setattr(MetricWriter, "write", write_on_a_full_disk)
    assert main(arguments) == 1
    monkeypatch.undo()
    error = capfd.readouterr().err
    assert "COULD NOT BE WRITTEN: no space left" in error
    assert "THE DISK IS FULL" in error
    assert "make room and run the same command again, which resumes from step" in error
    names = [path.name for path in (output / "checkpoints").iterdir()]
    (kept,) = (int(name) for name in names if name.isdigit())
    filler.unlink()
    assert main(arguments) == 0
    assert f"continues at step {kept}" in capfd.readouterr().out
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} >= {*range(kept + 1, 13)}
