"""What stands for gcloud, xpk, sbatch, python, salt … in the launchers' tests.

In: the name it is called by, its arguments and $STAND_INS/replies.json, which gives by name what
each call is to do, the last for all that follow. Out: a line of $STAND_INS/log for each call, and
hosts as folders: what a launcher runs on a worker is run by bash with that folder as its home.
"""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["STAND_INS"])
HOSTS = FOLDER / "hosts"
NAME, ARGUMENTS = pathlib.Path(sys.argv[0]).name, sys.argv[1:]


def host() -> str:
    return os.environ.get("SLURM_PROCID") or pathlib.Path(os.environ["HOME"]).name


def next_reply(name: str, default: object) -> object:
    """The next thing to do under a name."""
    with (FOLDER / "replies.json").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        replies = json.load(file)
        left = replies.get(name) or [default]
        reply = left.pop(0) if len(left) > 1 else left[0]
        replies[name] = left
        file.seek(0)
        file.truncate()
        json.dump(replies, file)
        file.flush()
    return reply


def flags(name: str) -> list[str]:
    return [a.partition("=")[2] for a in ARGUMENTS if a.startswith(f"--{name}=")]


def gcloud() -> int:
    if ARGUMENTS[:2] == ["storage", "cp"]:
        target = FOLDER / ARGUMENTS[-1].replace("gs://", "buckets/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ARGUMENTS[-2], target)
        log("sent", [])
        return 0
    verb = ARGUMENTS[3]
    hosts = sorted(HOSTS.iterdir())
    if flags("worker") == ["0"]:
        hosts = hosts[:1]
    if verb == "list":
        print(next_reply("states", "ACTIVE"), flush=True)
    if verb == "delete":
        for folder in HOSTS.iterdir():
            shutil.rmtree(folder)
            folder.mkdir()
    if verb == "scp":
        for folder in hosts:
            shutil.copy(ARGUMENTS[4], folder / ARGUMENTS[5].partition(":")[2])
    if verb == "ssh":
        code = next_reply("ssh", 0)
        if code:
            return int(str(code))
        [command] = flags("command")
        environment = {**os.environ, "USER": "somebody"}
        codes = [
            subprocess.run(
                ["bash", "-c", command], cwd=folder, env={**environment, "HOME": str(folder)}
            ).returncode
            for folder in hosts
        ]
        return next((code for code in codes if code), 0)
    return int(str(next_reply(verb, 0)))


def python() -> int:
    if "venv" in ARGUMENTS:
        programs = pathlib.Path(ARGUMENTS[-1]) / "bin"
        programs.mkdir(parents=True)
        for name in ("python", "salt"):
            shutil.copy(sys.argv[0], programs / name)
    elif "-c" in ARGUMENTS and "print" in ARGUMENTS[-1]:
        print("3.12")
    elif "-c" in ARGUMENTS:
        return int(str(next_reply("python_too_old", 0)))
    return 0


def uv() -> int:
    if "find" in ARGUMENTS:
        print(shutil.which("python3"))
    return 0


def salt() -> int:
    print(f"salt runs on {host()}", flush=True)
    log("given", [f"{name}={os.environ[name]}" for name in os.environ if "GIVEN" in name])
    reply = next_reply(f"salt {host()}", 0)
    if reply == "waits":
        signal.signal(signal.SIGTERM, lambda *_: (log("saved", []), sys.exit(75)))
        log("waits", [])
        print("salt waits", flush=True)
        while True:
            signal.pause()
    return int(str(reply))


def srun() -> int:
    command = ARGUMENTS[[a.startswith("--") for a in ARGUMENTS].index(False) :]
    tasks = [str(i) for i in range(int(os.environ["SLURM_NTASKS"]))]
    environments = [{**os.environ, "SLURM_PROCID": task} for task in tasks]
    return max(subprocess.run(command, env=e).returncode for e in environments)


def log(name: str, argv: list[str]) -> None:
    with (FOLDER / "log").open("a") as file:
        file.write(json.dumps({"name": name, "host": host(), "argv": argv}) + "\n")


def main() -> int:
    log(NAME, ARGUMENTS)
    known = {"gcloud": gcloud, "salt": salt, "srun": srun, "uv": uv}
    if NAME.startswith("python"):
        return python()
    if NAME in known:
        return known[NAME]()
    if NAME == "docker" and ARGUMENTS[-1:] == ["-"]:
        sys.stdin.buffer.read()  # what it is to build from
    if NAME == "hostname":
        print(host())
    if NAME == "squeue" and (jobs := next_reply("jobs", "")):
        print(jobs)
    return int(str(next_reply(NAME, 0)))


if __name__ == "__main__":
    sys.exit(main())
