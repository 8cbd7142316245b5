"""A clone with the launchers, and a PATH on which stand-ins answer for what is not here."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
STAND_IN = pathlib.Path(__file__).parent / "stand_in.py"
NAMES = ["gcloud", "xpk", "docker", "sbatch", "srun", "scontrol", "squeue", "hostname", "uv"]
NAMES += ["python3", "python3.11", "python3.12", "python3.13", "mountpoint", "sudo", "gcsfuse"]

# What must reach `salt` as it is, through one shell or three.
AWKWARD = [
    "--output_dir=/mnt/b/the run",
    "--cache=/mnt/b/the cache",
    "--gin.NAME='it''s $HOME'",
    '--gin.TEXT="$(date) `id` \\ & ; # *"',
    "--gin.LINES='a\n\tb'",
    "--gin.LETTERS='ω ≤ 1'",
    "--gin.EMPTY=''",
    "--gin.DOLLARS='$$ $(HOSTNAME) ${X}'",
    "",
]
TRAIN = ["--", "train", "--output_dir=/mnt/b/run"]


@pytest.fixture(scope="session")
def launcher_clone(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small clone: the launchers and what an installation reads, committed."""
    clone = tmp_path_factory.mktemp("a clone") / "salt_jax"
    shutil.copytree(ROOT / "launch", clone / "launch")
    shutil.copytree(ROOT / "requirements", clone / "requirements")
    shutil.copytree(ROOT / "salt_jax" / "commands", clone / "salt_jax" / "commands")
    shutil.copy(ROOT / "setup.py", clone)
    for command in ("init --quiet", "add .", "commit --quiet --message=All"):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *command.split()], cwd=clone, check=True)
    return clone


@dataclasses.dataclass(frozen=True)
class Launch:
    """Runs launchers among the stand-ins.

    Args:
      clone: Where the launchers are.
      folder: For the stand-ins' log, replies and hosts.
    """

    clone: pathlib.Path
    folder: pathlib.Path
    awkward = AWKWARD
    train = TRAIN

    @property
    def environment(self) -> dict[str, str]:
        """Of what is run: stand-ins first on PATH."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SALT_", "SLURM_"))}
        return {
            **kept,
            "PATH": f"{self.folder / 'bin'}:{kept['PATH']}",
            "STAND_INS": str(self.folder),
            "VENV": str(self.folder / "venv"),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "BASH_ENV": str(self.folder / "bash_env"),
            # Where bash begins to count: as if every script were up for long.
            "SECONDS": "9999",
        }

    def stand_in(self, name: str) -> None:
        """Puts a stand-in for a program on PATH."""
        program = self.folder / "bin" / name
        # -S: without site-packages it starts at once; stand-ins start stand-ins.
        program.write_text(f"#!{sys.executable} -SE\n{STAND_IN.read_text()}")
        program.chmod(0o755)

    def reply(self, **replies: Sequence[Any]) -> None:
        """Sets what the calls of a stand-in do, one after the other."""
        path = self.folder / "replies.json"
        names = {name.replace("salt_", "salt "): list(them) for name, them in replies.items()}
        path.write_text(json.dumps({**json.loads(path.read_text()), **names}))

    def each_run_takes(self, seconds: int) -> None:
        """To a script that waits for a command it is as if that had run so long."""
        (self.folder / "bash_env").write_text(
            f'wait() {{ local c=0; builtin wait "$@" || c=$?; SECONDS={seconds}; return $c; }}'
        )

    def order(self, *names: str) -> list[str]:
        """Which of these stand-ins was called after which."""
        return [line["name"] for line in self.log() if line["name"] in names]

    def command(self, script: str, *arguments: str) -> list[str]:
        """The words that start a launcher."""
        return [str(self.clone / "launch" / script), *arguments]

    def __call__(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a launcher to its end."""
        return subprocess.run(
            self.command(script, *arguments),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, script: str, *arguments: str) -> "subprocess.Popen[str]":
        """Starts a launcher, in a process group of its own as a terminal does."""
        return subprocess.Popen(
            self.command(script, *arguments),
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of all calls of a stand-in, in their order."""
        return [line["argv"] for line in self.log() if line["name"] == name]

    def log(self) -> list[dict[str, Any]]:
        """Every call."""
        path = self.folder / "log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def gcloud(self) -> list[str]:
        """The verbs of all calls of gcloud but those that only look."""
        verbs = []
        for words in self.calls("gcloud"):
            [command] = [w for w in words if w.startswith("--command=")] or [""]
            shown = next((v for v in ("install", "start", "follow") if f"sh {v}" in command), "")
            if words[0] != "storage" and words[3] != "list" and (words[3] != "ssh" or shown):
                verbs.append(shown or words[3])
        return verbs


@pytest.fixture
def launch(launcher_clone: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Launch]:
    """Two workers, on which `salt` ends well unless told otherwise."""
    (tmp_path / "bin").mkdir()
    launch = Launch(launcher_clone, tmp_path)
    for name in NAMES:
        launch.stand_in(name)
    for folder in ("home", "hosts/host0", "hosts/host1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "replies.json").write_text("{}")
    yield launch
    for pid in tmp_path.glob("hosts/*/salt_worker/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
