"""`salt evaluate` and `salt convert` beside lm-eval and transformers: whole commands, alternately.

    salt convert --model=RUN --output_dir=FOLDER
    python benchmarks/whole_commands.py --model RUN --huggingface FOLDER

Seconds include imports and loading, all have huge pages, and models are float32. "few_shot" is the
task of benchmarks/sums by lm-eval's `hf` backend, of single rows, its default, and by ours, whose
program the warm-up call leaves in the compilation cache. "import" and "export" are conversions into
a checkpoint and out of one, beside transformers' from_pretrained and save_pretrained. The ratios
are of seconds by the clock, and of seconds of CPU, which other work on the same cores changes less.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import measurement

SUMS = str(pathlib.Path(__file__).parent / "sums")
TRANSFORMERS = """
import sys, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


def run(cpu: list[float], *command: str) -> None:
    """Runs Python on a command, without a network; appends its CPU seconds to `cpu`. OUT stands for
    a new folder."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    with tempfile.TemporaryDirectory() as folder:
        filled = [part.replace("OUT", f"{folder}/out") for part in command]
        before = os.times()
        subprocess.run(
            [sys.executable, "-P", *filled], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        after = os.times()
    cpu.append(sum(after[2:4]) - sum(before[2:4]))  # of children


def compared(peer: tuple[str, ...], ours: tuple[str, ...], count: int) -> dict[str, Any]:
    """Seconds of both commands, and the peer's over ours."""
    cpu: dict[str, list[float]] = {"peer": [], "salt": []}
    sides = {
        "peer": functools.partial(run, cpu["peer"], *peer),
        "salt": functools.partial(run, cpu["salt"], "-m", "salt_jax", *ours, "--output_dir=OUT"),
    }
    by_clock = measurement.paired(sides, count)
    cpu = {name: seconds[1:] for name, seconds in cpu.items()}  # without the warm-up
    of_cpu = {"seconds": measurement.medians(cpu), **measurement.ratio(*cpu.values())}
    return {"by_clock": by_clock, "of_cpu": of_cpu}


def measure(model: str, huggingface: str, count: int) -> dict[str, Any]:
    """Of each pair of commands."""
    lm_eval = ("-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "sums")
    arguments = ("--model_args", f"pretrained={huggingface},dtype=float32", "--include_path", SUMS)
    tasks = ("--tasks=sums", f"--task_folder={SUMS}", "--prepend_start=False")
    saved = ("-c", TRANSFORMERS, huggingface, "OUT")
    return {
        "few_shot": compared(
            (*lm_eval, *arguments), ("evaluate", f"--model={model}", *tasks), count
        ),
        "import": compared(saved, ("convert", f"--huggingface={huggingface}"), count),
        "export": compared(saved, ("convert", f"--model={model}"), count),
    }


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=3)
    parser.add_argument("--model", required=True, help="a run's folder")
    parser.add_argument("--huggingface", required=True, help="the same model, exported")
    flags = parser.parse_args()
    results = measure(flags.model, flags.huggingface, flags.rounds)
    measurement.report("whole_commands", {"settings": vars(flags), **results})


if __name__ == "__main__":
    main()
