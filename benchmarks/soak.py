"""Runs that are killed again and again, against runs that are left alone: the same parameters?

    python benchmarks/soak.py --kills 50
    python benchmarks/soak.py --kills 200 --arms salt_ds --processes 2 --work soak

Makes a cache of this package's own text, an SLM, its scores and a selection; trains an LLM of every
arm once without a kill; then trains it again under SIGKILL at random instants of its life, starting
the same command until it has finished, and compares the last checkpoint bit by bit. It goes on with
further runs until there were as many kills as asked for. Where each kill hit is told by what it
left: before the first step (imports, loading, compiling), in stage 1, within ten steps of the
switch, in stage 2, and how often a checkpoint was half-written. "differing" must be 0.

Of several processes all are killed, or one of them, in turn; the others must end by themselves.
"""

import collections
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import measurement
import numpy as np

from salt_jax.training.checkpoints import complete_steps, find_model
from salt_jax.training.partitioning import MeshConfig

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
ARMS = {
    "baseline": ("--gin_file=methods/baseline.gin",),
    "salt": ("--gin_file=methods/salt.gin", "--teacher={work}/slm"),
    "salt_ds": (
        *("--gin_file=methods/salt_ds.gin", "--teacher={work}/slm"),
        "--selection={work}/selection",
    ),
}
SURVIVORS_SECONDS = 90


class Soak:
    """Runs of one arm.

    Args:
      work: The folder of all inputs and runs.
      arm: A name of ARMS.
      steps: Of a run; half of them are stage 1.
      processes: How many train together.
    """

    def __init__(self, work: pathlib.Path, arm: str, steps: int, processes: int) -> None:
        self._work, self._arm, self._steps, self._processes = work, arm, steps, processes

    def start(self, output: pathlib.Path) -> list["subprocess.Popen[bytes]"]:
        """The processes of the run in a folder, begun or to be begun."""
        flags = [flag.format(work=self._work) for flag in ARMS[self._arm]]
        flags += [f"--gin.N_KD={self._steps // 2}"] if self._arm != "baseline" else []
        together = []
        if self._processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            together = [f"--coordinator_address=127.0.0.1:{port}"]
            together += [f"--process_count={self._processes}"]
        command = [
            *(sys.executable, "-m", "salt_jax", "train", "--gin_file=runs/smoke_llm.gin", *flags),
            *(f"--cache={self._work}/cache", f"--steps={self._steps}", "--log_every=1"),
            *("--gin.SAVE_EVERY=10", f"--gin.EVALUATE_EVERY={self._steps}", "--batch_size=8"),
            *("--gin.decoder.DecoderConfig.embed_dim=32", "--gin.decoder.DecoderConfig.mlp_dim=64"),
            *("--gin.decoder.DecoderConfig.num_heads=2", f"--output_dir={output}"),
            *(f"--compilation_cache={self._work}/programs", *together),
        ]
        with open(f"{output}.log", "ab") as log:
            return [
                subprocess.Popen(
                    [*command, *([f"--process_index={index}"] if together else [])],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for index in range(self._processes)
            ]

    def train(self, output: pathlib.Path) -> float:
        """A run that is left alone; gives its seconds."""
        begun = time.monotonic()
        codes = [process.wait() for process in self.start(output)]
        if codes != [0] * self._processes:
            raise SystemExit(f"{output}.log says why a run ended with {codes}.")
        return time.monotonic() - begun

    def torment(self, output: pathlib.Path, seconds: float, most: int) -> collections.Counter[str]:
        """A run that is killed up to `most` times, at instants of `seconds`, until it has ended."""
        hits: collections.Counter[str] = collections.Counter()
        while True:
            members = self.start(output)
            until = time.monotonic() + random.uniform(0.0, seconds)
            may_kill = hits.total() < most
            while any(member.poll() is None for member in members):
                if may_kill and time.monotonic() > until:
                    break
                time.sleep(0.01)
            codes = [member.poll() for member in members]
            if None not in codes:
                if codes == [0] * len(members):
                    return hits
                raise SystemExit(f"{output}.log says why a run ended with {codes}.")
            hits[self._where(output)] += 1
            victims = members if hits.total() % 2 else [random.choice(members)]
            for victim in victims:
                os.killpg(victim.pid, signal.SIGKILL)
            for member in members:
                member.wait(SURVIVORS_SECONDS)

    def _where(self, output: pathlib.Path) -> str:
        if any((output / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
            return "while a checkpoint was written"
        metrics, begun = output / "metrics.jsonl", output / "run.json"  # written at every start
        if not metrics.exists() or metrics.stat().st_mtime < begun.stat().st_mtime:
            return "before the first step"
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
        if not lines:
            return "before the first step"
        step, switch = json.loads(lines[-1])["step"], self._steps // 2
        if self._arm != "baseline" and abs(step - switch) <= 10:
            return "within 10 steps of the switch"
        return "in stage 1" if step < switch and self._arm != "baseline" else "in stage 2"


def parameters(output: pathlib.Path, steps: int) -> list[np.ndarray]:
    """Those of a run's last checkpoint."""
    if complete_steps(output)[-1] != steps:
        raise SystemExit(f"{output} has no checkpoint of step {steps}.")
    mesh = MeshConfig(fsdp=1).make(jax.devices()[:1])
    params = find_model(output, steps, "model").load_params(mesh)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def prepare(work: pathlib.Path) -> None:
    """Cache, SLM, scores and selection, made once."""
    text = f"{PACKAGE}/salt_jax/**/*.py"
    slm = ["--gin_file=runs/smoke_slm.gin", "--gin_file=methods/baseline.gin", "--steps=40"]
    slm += ["--gin.KEEP_STEPS=()"]
    cache = f"--cache={work}/cache"
    size, half = "--gin.VOCABULARY_SIZE=512", "--gin.FRACTION=0.5"
    commands = {
        "cache": ["prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{text}'", size],
        "slm": ["train", *slm, cache],
        "scores": ["score", f"--scorer={work}/slm", cache],
        "selection": [
            *("select", "--gin_file=methods/top_fraction.gin", half, cache),
            f"--scores={work}/scores",
        ],
    }
    for name, command in commands.items():
        if not (work / name / "summary.json").exists():
            typed = [sys.executable, "-m", "salt_jax", *command, f"--output_dir={work / name}"]
            subprocess.run(typed, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    made = measurement.parser(__doc__)
    made.add_argument("--kills", type=int, default=50, help="of every arm")
    made.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--kills_a_run", type=int, default=10)
    made.add_argument("--work", type=pathlib.Path, help="kept; a temporary folder by default")
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or pathlib.Path(temporary)).absolute()
        work.mkdir(exist_ok=True)
        prepare(work)
        results: dict[str, Any] = {}
        for arm in arguments.arms:
            results[arm] = soak(work, arm, arguments)
        measurement.report("soak", results)
    if any(result["differing"] for result in results.values()):
        sys.exit(1)


def soak(work: pathlib.Path, arm: str, arguments: Any) -> dict[str, Any]:
    """Kills of one arm, where they hit, and how many runs ended otherwise than the one alone."""
    one = Soak(work, arm, arguments.steps, arguments.processes)
    stem = f"{arm}-{os.getpid()}"
    one.train(work / f"{stem}-warm")  # compiles
    seconds = one.train(work / f"{stem}-alone")
    expected = parameters(work / f"{stem}-alone", arguments.steps)
    hits: collections.Counter[str] = collections.Counter()
    runs = differing = 0
    while hits.total() < arguments.kills:
        output = work / f"{stem}-{runs}"
        most = min(arguments.kills_a_run, arguments.kills - hits.total())
        hits += one.torment(output, seconds, most)
        found = parameters(output, arguments.steps)
        same = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        runs, differing = runs + 1, differing + (not same)
    return {"kills": hits.total(), "where": dict(hits), "runs": runs, "differing": differing}


if __name__ == "__main__":
    main()
