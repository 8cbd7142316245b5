"""A soak test: runs that are killed repeatedly must end with the parameters of undisturbed ones.

    python benchmarks/soak.py --kills 50
    python benchmarks/soak.py --kills 200 --arms salt_ds --processes 2 --work soak --seed 7

Makes a cache of this package's own text, an SLM, its scores and a selection; trains an LLM of every
arm once undisturbed; then trains it again with SIGKILL at random times, repeating the same command
until it has finished, and compares the last checkpoint, parameters and optimizer, bit by bit. It
repeats this until it has made the requested number of kills. In every second run every second start
has to compile, and the next one finds what a kill left of the compilation cache. Kills are counted
by what they interrupted: before the run said what it would do (imports, checking inputs), while it
loaded (and compiled), in stage 1, within ten steps of the switch, in stage 2, and while a
checkpoint was written. "differing" must be 0.

With several processes, alternately all or one of them are killed once they have met; the others
must then exit with 75 and name the missing one.
"""

import collections
import contextlib
import dataclasses
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
from collections.abc import Sequence
from typing import Any

import jax
import measurement
import numpy as np
import orbax.checkpoint as ocp

from salt_jax.storage.run_folder import CHECKPOINTS_FOLDER
from salt_jax.training.checkpoint_digests import item_digest
from salt_jax.training.checkpoints import complete_steps

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
SAYS_WHAT_IT_WILL_DO = " parameters, "  # all processes have met by then


class Soak:
    """Runs of one arm.

    Args:
      work: The folder of all inputs and runs.
      arm: A name in ARMS.
      steps: Steps of a run; half of them are stage 1.
      processes: The number of processes of a run.
      chance: Draws when and which process to kill.
    """

    def __init__(
        self, work: pathlib.Path, arm: str, steps: int, processes: int, chance: random.Random
    ) -> None:
        self._work, self._arm, self._steps, self._processes = work, arm, steps, processes
        self._chance = chance
        self._programs = work / f"{arm}-{os.getpid()}-programs"

    def start(self, output: pathlib.Path, programs: pathlib.Path) -> "Start":
        """Starts or resumes the run in `output`, with the compilation cache `programs`."""
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
            *(f"--compilation_cache={programs}", *together),
        ]
        path = pathlib.Path(f"{output}.log")
        with path.open("ab") as log:
            return Start(
                log=path,
                logged=log.tell(),
                compiles=not programs.exists(),
                members=[
                    subprocess.Popen(
                        [*command, *([f"--process_index={index}"] if together else [])],
                        env={**os.environ, "PYTHONUNBUFFERED": "1"},
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                    for index in range(self._processes)
                ],
            )

    def train(self, output: pathlib.Path) -> float:
        """Trains without a kill; returns the seconds."""
        begun = time.monotonic()
        started = self.start(output, self._programs)
        started.require([member.wait() for member in started.members] == [0] * self._processes)
        return time.monotonic() - begun

    def torment(
        self, output: pathlib.Path, seconds: float, most: int, compiles: bool
    ) -> collections.Counter[str]:
        """Kills and repeats a run until it has ended; returns what the kills interrupted.

        Args:
          output: Its folder.
          seconds: Duration of an undisturbed run, over which kills are uniformly distributed.
          most: The most kills.
          compiles: Whether every second start has no compiled programs; the next start has what a
            kill left of them.
        """
        hits: collections.Counter[str] = collections.Counter()
        programs = self._programs
        while True:
            if compiles:
                programs = pathlib.Path(f"{output}-programs-{hits.total() // 2}")
            started = self.start(output, programs)
            until = time.monotonic() + self._chance.uniform(0.0, seconds)
            while started.running():
                if hits.total() < most and time.monotonic() > until:
                    break
                time.sleep(0.01)
            if not started.running():
                started.require(
                    [member.poll() for member in started.members] == [0] * self._processes
                )
                return hits
            hits[self._where(output, started)] += 1
            self._kill(started, output, all_of_them=hits.total() % 2 == 1)

    def _kill(self, started: "Start", output: pathlib.Path, all_of_them: bool) -> None:
        """Kills all processes, or one that the others must report if they have met it."""
        all_of_them = all_of_them or SAYS_WHAT_IT_WILL_DO not in started.said()
        victims = started.members if all_of_them else [self._chance.choice(started.members)]
        _kill_all(victims)
        survivors = [member for member in started.members if member not in victims]
        try:
            codes = [survivor.wait(SURVIVORS_SECONDS) for survivor in survivors]
        except subprocess.TimeoutExpired:
            codes = []
            _kill_all(survivors)
        if survivors and not (output / "COMPLETED").exists():
            started.require(codes == [75] * len(survivors) and "gone missing" in started.said())

    def _where(self, output: pathlib.Path, started: "Start") -> str:
        if SAYS_WHAT_IT_WILL_DO not in started.said():
            return "before it said what it would do"
        metrics, begun = output / "metrics.jsonl", output / "run.json"  # written at every start
        lines: list[str] = []
        if metrics.exists() and metrics.stat().st_mtime >= begun.stat().st_mtime:
            lines = [
                line
                for line in metrics.read_text(encoding="utf-8").splitlines()
                if line.endswith("}")
            ]
        if not lines:
            return "while it loaded or compiled" if started.compiles else "while it loaded"
        if any((output / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
            return "while a checkpoint was written"
        step, switch = json.loads(lines[-1])["step"], self._steps // 2
        if self._arm != "baseline" and abs(step - switch) <= 10:
            return "within 10 steps of the switch"
        return "in stage 1" if step < switch and self._arm != "baseline" else "in stage 2"


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
      log: The log, which earlier starts have written, too.
      logged: Bytes of the log from earlier starts.
      compiles: Whether it finds no compiled programs.
      members: Its processes.
    """

    log: pathlib.Path
    logged: int
    compiles: bool
    members: list["subprocess.Popen[bytes]"]

    def running(self) -> bool:
        """Whether one of the processes is running."""
        return any(member.poll() is None for member in self.members)

    def said(self) -> str:
        """Its output so far."""
        with self.log.open("rb") as log:
            log.seek(self.logged)
            return log.read().decode(errors="replace")

    def require(self, as_promised: bool) -> None:
        """Ends the soak if a run ended in a wrong way."""
        if not as_promised:
            codes = [member.returncode for member in self.members]
            raise SystemExit(f"{self.log} says why a run ended with {codes}.")


def _kill_all(members: Sequence["subprocess.Popen[bytes]"]) -> None:
    for member in members:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(member.pid, signal.SIGKILL)
    for member in members:
        member.wait()


def last_state(output: pathlib.Path, steps: int) -> list[np.ndarray]:
    """Parameters and optimizer state of a run's last checkpoint."""
    if complete_steps(output)[-1] != steps:
        raise SystemExit(f"{output} has no checkpoint of step {steps}.")
    leaves: list[np.ndarray] = []
    for item in ("params", "optimizer"):
        folder = output / CHECKPOINTS_FOLDER / str(steps) / item
        item_digest(folder.parent, item)
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            leaves += jax.tree.leaves(checkpointer.restore(folder, restore_args=as_numpy))
    return leaves


def prepare(work: pathlib.Path) -> None:
    """Makes the cache, the SLM, its scores and a selection, once."""
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
    made.add_argument("--seed", type=int, default=int(time.time()), help="of when and whom to kill")
    made.add_argument("--work", type=pathlib.Path, help="kept; a temporary folder by default")
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or pathlib.Path(temporary)).absolute()
        work.mkdir(exist_ok=True)
        prepare(work)
        results: dict[str, Any] = {}
        for arm in arguments.arms:
            results[arm] = soak(work, arm, arguments)
            print(arm, results[arm], flush=True)
        measurement.report("soak", {"seed": arguments.seed, **results})
    if any(result["differing"] for result in results.values()):
        sys.exit(1)


def soak(work: pathlib.Path, arm: str, arguments: Any) -> dict[str, Any]:
    """Kills of one arm, what they interrupted, and the number of runs with a different result."""
    chance = random.Random(f"{arguments.seed} {arm}")
    one = Soak(work, arm, arguments.steps, arguments.processes, chance)
    stem = f"{arm}-{os.getpid()}"
    lives = {True: one.train(work / f"{stem}-compiled")}
    lives[False] = one.train(work / f"{stem}-alone")
    expected = last_state(work / f"{stem}-alone", arguments.steps)
    hits: collections.Counter[str] = collections.Counter()
    runs = differing = 0
    while hits.total() < arguments.kills:
        output, compiles = work / f"{stem}-{runs}", runs % 2 == 1
        most = min(arguments.kills_a_run, arguments.kills - hits.total())
        hits += one.torment(output, lives[compiles], most, compiles)
        found = last_state(output, arguments.steps)
        same = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        runs, differing = runs + 1, differing + (not same)
    return {"kills": hits.total(), "where": dict(hits), "runs": runs, "differing": differing}


if __name__ == "__main__":
    main()
