"""Several processes that run one command: how they meet, and which of them went missing.

In: a coordinator's address, how many processes there are and which this one is, from flags, from
the environment or found out by JAX. Out: one program over the devices of all; each process writes
its pulse into the output folder, so that the others can say who is gone instead of waiting for it.
Only the first process prints and writes files of the run; a file system that all share is needed.
"""

import collections
import hashlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import INTERRUPTED, InputError, RunFailed
from salt_jax.runtime.output_streams import tell_at_once
from salt_jax.terminal import warn

PROCESSES_FOLDER = "processes"
FLAGS = ("coordinator_address", "process_count", "process_index", "multi_process")

_TRUE, _FALSE = ("True", "true", "1"), ("False", "false", "0")
_BEAT_SECONDS = 2.0
_PATIENCE_SECONDS = 30.0
# What a pulse can hold at most: two reasons, of characters of which JSON makes 12 bytes each.
_FILE_BYTES = 8192
_REASON_CHARACTERS = 300


class Processes:
    """Those that run this command.

    Args:
      index: This one, from 0 on.
      count: All.
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count
        self._pulse: Pulse | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    def wait(self, name: str) -> None:
        """Returns when all have come to the place of this name in the program."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def require_same(self, **texts: str) -> None:
        """Refuses, in every process, what one of them was started with and another was not.

        Args:
          **texts: What must be the same, by its name in the sentence.

        Raises:
          InputError: With the first process that differs from process 0.
        """
        if self.count == 1:
            return
        import numpy as np
        from jax.experimental import multihost_utils

        digests = [hashlib.sha256(text.encode()).digest() for text in texts.values()]
        ours_TxB = np.array([[*digest] for digest in digests], np.int32)
        all_PxTxB = np.asarray(multihost_utils.process_allgather(ours_TxB))
        for at, name in enumerate(texts):
            for index in range(1, self.count):
                if (all_PxTxB[index, at] != all_PxTxB[0, at]).any():
                    raise InputError(
                        f"Process {index} of {self.count} has other {name} than process 0: give "
                        "all of them the same command, files and versions."
                    )

    def watch(self, folder: pathlib.Path) -> None:
        """From here on ends this process with a sentence when another is gone.

        Args:
          folder: The output folder, which is there.
        """
        if self.count > 1 and self._pulse is None:
            self._pulse = Pulse(folder, self)
            self.wait("pulse")
            self._pulse.start()

    def end(self, reason: str = "") -> None:
        """Tells the others that this process ends, and why, if it is not finished."""
        if self._pulse is not None:
            self._pulse.stop(reason)

    def hear_who_is_lost(self) -> None:
        """After an error that a lost process may have caused: waits until that would be known."""
        if self._pulse is not None:
            self._pulse.wait(2 * _PATIENCE_SECONDS)


def are_several(settings: Mapping[str, str]) -> bool:
    """Whether flags or the environment speak of other processes; see `join`."""
    given = _given(settings)
    return given["multi_process"] in _TRUE or any(given[name] for name in FLAGS[:3])


def who_coordinated(folder: pathlib.Path) -> str:
    """After JAX has aborted this process: a sentence about the first one, where all meet."""
    state = _read(folder / PROCESSES_FOLDER / "0.json")
    return (
        f"process 0 on {state.get('host', 'an unknown host')}, where all meet, has gone missing, "
        "or the network to it: run the same command on every host again to go on."
    )


def join(settings: Mapping[str, str], saves_on_request: bool = False) -> Processes:
    """Meets the other processes; must come before anything asks JAX for devices.

    Args:
      settings: Those of FLAGS that were typed. SALT_COORDINATOR_ADDRESS, … stand for those that
        were not. Without any this process is alone; with multi_process=True JAX finds the others
        out where it can (TPU VMs, GKE, SLURM, Open MPI).
      saves_on_request: Whether the verb asks `multihost_utils.reached_preemption_sync_point`.

    Raises:
      InputError: Some of the three are missing, not numbers or out of range; or some processes have
        more devices than others.
      RunFailed: The others did not come.
    """
    given = _given(settings)
    address, count, index, found_out = (given[name] for name in FLAGS)
    if found_out not in ("", *_TRUE, *_FALSE):
        raise InputError(f"multi_process is {found_out!r}: set it to True or False.")
    if not are_several(settings):
        return Processes()
    by_hand = [name for name in FLAGS[:3] if given[name]]
    if by_hand and len(by_hand) < 3:
        missing = [name for name in FLAGS[:3] if not given[name]]
        raise InputError(
            f"Of {', '.join(FLAGS[:3])} only {', '.join(by_hand)} is set: add "
            f"--{missing[0]}=VALUE, or --multi_process=True alone where JAX finds them out."
        )
    known: dict[str, Any] = {}
    if by_hand:
        known = {
            "coordinator_address": address,
            "num_processes": _number("process_count", count, 1),
            "process_id": _number("process_index", index, 0),
            "cluster_detection_method": "deactivate",
        }
        if known["process_id"] >= known["num_processes"]:
            raise InputError(
                f"process_index is {index} of {count} processes, which count from 0: change "
                "--process_index."
            )
        if ":" not in address:
            raise InputError(
                f"coordinator_address is {address!r}: give it a port, as in HOST:8476."
            )
        if known["num_processes"] == 1:
            return Processes()
    return _initialize(known, saves_on_request)


def _initialize(known: Mapping[str, Any], saves_on_request: bool) -> Processes:
    import jax

    # It takes SIGTERM for itself, and only `salt train` asks it whether there was one.
    jax.config.update("jax_enable_preemption_service", saves_on_request)
    try:
        jax.distributed.initialize(**known, shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(  # which launchers try again: a host may only be slow
            f"The processes did not meet ({reason}): start as many as --process_count says, each "
            "with its own --process_index and the address of process 0 as --coordinator_address."
        ) from error
    # No program over the devices of all can be made, not even one that says so to the others.
    devices = collections.Counter(device.process_index for device in jax.devices())
    fewest, most = (choose(devices, key=lambda index: devices[index]) for choose in (min, max))
    if devices[fewest] != devices[most]:
        raise InputError(
            f"Process {fewest} has {devices[fewest]} devices and process {most} has "
            f"{devices[most]}: show each process as many (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS, "
            "JAX_NUM_CPU_DEVICES), or start none on that host."
        )
    return Processes(jax.process_index(), jax.process_count())


def _given(settings: Mapping[str, str]) -> dict[str, str]:
    return {
        name: settings.get(name) or os.environ.get(f"SALT_{name.upper()}", "") for name in FLAGS
    }


def _number(name: str, text: str, lowest: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = lowest - 1
    if number < lowest:
        raise InputError(
            f"{name} is {text!r}, expected a number from {lowest} on: change --{name}."
        )
    return number


class Pulse:
    """Tells the other processes that this one lives, and this one when another doesn't.

    Each process counts up a number in OUTPUT/processes/INDEX.json. The first watches all, the
    others watch the first, which names who is missing; clocks are never compared. The file is
    written over in place and keeps its size, so that a disk that has become full stops no pulse;
    only its end grows, so that of a file that was read while it was written nothing is mistaken
    for an end.

    Args:
      folder: The output folder, which all share.
      processes: Those that run.
    """

    def __init__(self, folder: pathlib.Path, processes: Processes) -> None:
        self._folder = folder / PROCESSES_FOLDER
        self._index, self._count = processes.index, processes.count
        self._own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
        self._states: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._failing = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._run, daemon=True, name="pulse")
        self._folder.mkdir(exist_ok=True)
        self._write()

    def start(self) -> None:
        """Begins; all others have written their first number."""
        self._thread.start()

    def stop(self, ended: str = "") -> None:
        """Ends, and says why if this process is not finished."""
        self._stopped.set()
        self._write(ended=ended[:_REASON_CHARACTERS])

    def wait(self, seconds: float) -> None:
        """Lets the thread go on for a while."""
        self._thread.join(seconds)

    def beat(self) -> str:
        """Counts on by one; gives who is gone, "" while nobody is."""
        if not self._write(beat=self._own["beat"] + 1):
            self._seen.clear()  # nor may the others be able to: their silence says nothing
        return self._lost()

    def _run(self) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            if os.getppid() != self._parent:  # what started this process was killed
                os._exit(INTERRUPTED)
            lost = self.beat()
            if lost and not self._stopped.is_set():
                self._write(lost=lost[:_REASON_CHARACTERS])
                tell_at_once(f"{lost}: run the same command on every host again to go on.")
                os._exit(INTERRUPTED)  # the main thread may be waiting for ever

    def _lost(self) -> str:
        for index in range(1, self._count) if self._index == 0 else (0,):
            # What cannot be read, or not as a whole, is as it was: no news, and no beat.
            state = _read(self._folder / f"{index}.json") or self._states.get(index, {})
            self._states[index] = state
            if state.get("lost"):
                return str(state["lost"])
            who = f"process {index} of {self._count} on {state.get('host', 'an unknown host')}"
            if state.get("ended"):
                return f"{who} ended ({state['ended']})"
            beat, now = state.get("beat"), time.monotonic()
            last, since = self._seen.get(index, (None, now))
            if beat != last or index not in self._seen:
                self._seen[index] = beat, now
            elif now - since > _PATIENCE_SECONDS and "ended" not in state:
                return f"{who} (pid {state.get('pid')}) has gone missing"
        return ""

    def _write(self, **news: Any) -> bool:
        """Whether the others can read the news."""
        with self._lock:
            if "ended" not in self._own:
                self._own.update(news)
            text = json.dumps(self._own).encode().ljust(_FILE_BYTES - 1) + b"\n"
            try:
                _write_over(self._folder / f"{self._index}.json", text)
            except OSError as error:
                if not self._failing:
                    warn(f"the pulse could not be written ({error.strerror})")
                self._failing = True
                return False
            self._failing = False
            return True


def _write_over(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that keeps its blocks, and closes it: network file systems send it then."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
        file.write(content)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a file system that lags behind, or fails for a while
        return {}
    return state if isinstance(state, dict) else {}
