"""Few-shot evaluation beside lm-eval's own `hf` backend: whole commands, alternately.

    salt convert --model=RUN --output_dir=FOLDER
    python benchmarks/few_shot.py --model RUN --huggingface FOLDER

Both evaluate the task of benchmarks/sums in float32, with imports, loading and huge pages; lm_eval
by single rows, its default, ours with its program from the compilation cache, which the warm-up
call fills. The ratios are of seconds by the clock, and of seconds of CPU, which other work on the
same cores changes less.
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


def run(cpu: list[float], module: str, *flags: str) -> None:
    """Runs a module's command, without a network; appends its CPU seconds to `cpu`."""
    command = [sys.executable, "-P", "-m", module, *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    before = os.times()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu.append(sum(after[2:4]) - sum(before[2:4]))  # of children


def salt(cpu: list[float], model: str) -> None:
    """`salt evaluate`, into a new folder, since a finished one is not evaluated again."""
    with tempfile.TemporaryDirectory() as out:
        tasks = ("--tasks=sums", f"--task_folder={SUMS}", "--prepend_start=False")
        run(cpu, "salt_jax", "evaluate", f"--model={model}", *tasks, f"--output_dir={out}/run")


def measure(model: str, huggingface: str, count: int) -> dict[str, Any]:
    """Seconds of both commands, and lm-eval's over ours."""
    arguments = ("--model_args", f"pretrained={huggingface},dtype=float32", "--device", "cpu")
    tasks = ("--tasks", "sums", "--include_path", SUMS)
    cpu: dict[str, list[float]] = {"lm_eval": [], "salt": []}
    peer = functools.partial(run, cpu["lm_eval"], "lm_eval", "--model", "hf", *arguments, *tasks)
    ours = functools.partial(salt, cpu["salt"], model)
    by_clock = measurement.paired({"lm_eval": peer, "salt": ours}, count)
    cpu = {name: seconds[1:] for name, seconds in cpu.items()}  # without the warm-up
    of_cpu = {"seconds": measurement.medians(cpu), **measurement.ratio(*cpu.values())}
    return {"by_clock": by_clock, "of_cpu": of_cpu}


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=3)
    parser.add_argument("--model", required=True, help="a run's folder")
    parser.add_argument("--huggingface", required=True, help="the same model, exported")
    flags = parser.parse_args()
    results = measure(flags.model, flags.huggingface, flags.rounds)
    measurement.report("few_shot", {"settings": vars(flags), **results})


if __name__ == "__main__":
    main()
