"""The switch from stage 1 to stage 2: the longest step around it over the median of stage 2.

    python benchmarks/switch.py
    python benchmarks/switch.py --steps 600 --n_kd 300 --embed_dim 256 --layers 4

Runs `salt train` itself, with SALT's schedule, a teacher and a cache of random bytes in a temporary
folder. Compiling a program would show as a step many times as long as the others; "programs_made"
counts programs compiled (or loaded from the persistent cache) after the first step, and must be 0.
What remains is the first execution of a compiled program, some hundredths of a second:
"extra_seconds", and "ratio" for steps of this length.

Steps are timed as in metrics.jsonl; evaluations and checkpoints, which the run makes only at its
end, are not included. Stage 1's steps take longer by arithmetic, so both sides of the switch are
given separately as well; "rest_of_stage_2" shows the machine's own noise.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import measurement
import numpy as np

from salt_jax.commands.train import train
from salt_jax.data import features
from salt_jax.data.cache_shards import cache_shard, write_shard
from salt_jax.data.packed_cache import begin_cache, finish_cache
from salt_jax.data.row_records import RecordFormat
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.distill import losses, schedules
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.run_folder import RunFolder
from salt_jax.training import config, loop
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.learning_rates import WarmupCosine
from salt_jax.training.optimizers import AdamW

EVALUATED_ROWS = 16


def write_cache(folder: pathlib.Path, rows: int, length: int) -> None:
    """Writes a packed cache of random bytes, one document per row."""
    vocabulary = ByteVocabulary()
    begin_cache(folder)
    form, splits = RecordFormat(length, vocabulary.size), {}
    random = np.random.default_rng(0)
    ones = np.ones(length)
    for split, count in (("train", rows), ("validation", EVALUATED_ROWS), ("test", EVALUATED_ROWS)):
        made = [
            features.make_row(
                random.integers(vocabulary.size, size=length, dtype=np.int32),
                ones.astype(np.float32),
                ones.astype(np.int32),
                0,
            )
            for _ in range(count)
        ]
        file = cache_shard(folder, split, 0, 1)
        counts = write_shard(file, made, form, ("bytes",), folder / "rows.tmp")
        splits[split] = {f"{split}/{file.name}": counts}, {}
    about = {"vocabulary": vocabulary, "sequence_length": length, "subsets": ("bytes",)}
    finish_cache(folder, splits, **about)


@contextlib.contextmanager
def counted_programs() -> Iterator[list[int]]:
    """A context with a list of the programs compiled by the time each step was dispatched."""
    counts: list[int] = []
    dispatch = loop.Loop._step

    def step(self: Any, *arguments: Any) -> Any:
        result = dispatch(self, *arguments)
        counts.append(counter.compiled)
        return result

    with measurement.CompilationCounter() as counter:
        loop.Loop._step = step  # type: ignore[method-assign]
        try:
            yield counts
        finally:
            loop.Loop._step = dispatch  # type: ignore[method-assign]


def run(flags: argparse.Namespace, folder: pathlib.Path) -> tuple[list[float], int]:
    """Seconds of every step of a SALT run, and the programs compiled after its first step."""
    write_cache(folder / "cache", 4 * flags.batch, flags.length)
    student = DecoderConfig(
        embed_dim=flags.embed_dim,
        num_layers=flags.layers,
        num_heads=max(flags.embed_dim // 64, 1),
        mlp_dim=4 * flags.embed_dim,
        max_length=flags.length,
    )
    heads = max(student.num_heads // 2, 1)
    teacher = dataclasses.replace(
        student, embed_dim=64 * heads, num_heads=heads, mlp_dim=256 * heads
    )
    settings: dict[str, Any] = {
        "data": config.Data(str(folder / "cache"), flags.batch),
        "optimizer": AdamW(WarmupCosine(1e-3, warmup_steps=5)),
        "checkpoints": CheckpointConfig(save_every=0),
        "devices": config.Devices(compilation_cache=""),
    }
    loss = losses.LossConfig(teacher_temperature=0.25)
    plain = schedules.NoDistillation()
    train(
        RunFolder(folder / "slm", "train"),
        config=config.TrainConfig(
            model=teacher, method=config.Method("slm", plain, loss), steps=1, **settings
        ),
    )
    with counted_programs() as made:
        train(
            RunFolder(folder / "salt", "train"),
            config=config.TrainConfig(
                model=student,
                method=config.Method(
                    "salt",
                    schedules.Step(omega=2 / 3, n_kd=flags.n_kd),
                    loss,
                    teacher=config.Teacher(str(folder / "slm")),
                ),
                steps=flags.steps,
                evaluation=config.Evaluation(every=flags.steps),
                log_every=1,
                **settings,
            ),
        )
    lines = (folder / "salt" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return [record["seconds_per_step"] for record in records], made[-1] - made[0]


def results(seconds: list[float], n_kd: int, around: int) -> dict[str, Any]:
    """The results from seconds of steps; `around` steps on each side are near the switch."""
    stage1, stage2 = seconds[around:n_kd], seconds[n_kd:]
    near = seconds[n_kd - around : n_kd + around]
    far = stage2[around:]
    median = statistics.median(far)
    return {
        "longest_step_around_the_switch": max(near),
        "median_step_of_stage_2": median,
        "ratio": max(near) / median,
        "extra_seconds": max(near) - median,
        "steps_around": around,
        "before_the_switch": {
            "longest": max(near[:around]),
            "median_of_stage_1": statistics.median(stage1),
            "longest_over_median": max(near[:around]) / statistics.median(stage1),
        },
        "after_the_switch": {
            "first": stage2[0],
            "longest": max(near[around:]),
            "longest_over_median": max(near[around:]) / median,
        },
        "rest_of_stage_2": {"longest": max(far), "longest_over_median": max(far) / median},
    }


def main() -> None:
    """Measures and prints."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    for name, default, text in (
        ("steps", 300, "of the run"),
        ("n_kd", 150, "steps of stage 1"),
        ("around", 5, "steps on each side of the switch that count as around it"),
        ("embed_dim", 128, "width of the student; the teacher is half as wide"),
        ("layers", 4, "of both models"),
        ("batch", 8, "rows of a step, a multiple of the devices"),
        ("length", 128, "tokens of a row"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    flags = parser.parse_args()
    if not 2 * flags.around < flags.n_kd < flags.steps - 2 * flags.around:
        parser.error("--n_kd must leave more than twice --around steps on each side of it")
    jax.config.update("jax_enable_compilation_cache", False)
    # The run's own output goes to stderr, apart from the result.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        seconds, programs_made = run(flags, pathlib.Path(folder))
    measurement.report(
        "switch",
        {
            "settings": vars(flags),
            "programs_made": programs_made,
            **results(seconds, flags.n_kd, flags.around),
        },
    )


if __name__ == "__main__":
    main()
