"""Joins the processes that run one command over all their devices.

The coordinator's address, the process count and this process's index come from flags, from the
environment or from JAX's cluster detection. Only process 0 prints and writes the run's files, in a
folder that all share.
"""

import collections
import hashlib
import os
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError, RunFailed
from salt_jax.runtime.key_value_store import KeyValueStore
from salt_jax.runtime.pulse import Pulse, patience_seconds

# Environment variable set by a parent process (`run_guarded`): the file descriptor to which the
# child writes the coordinator's host.
GUARDED = "SALT_GUARDED"
FLAGS = ("coordinator_address", "process_count", "process_index", "multi_process")

_SENTENCE_BYTES = 2048
_TRUE, _FALSE = ("True", "true", "1"), ("False", "false", "0")


class Processes:
    """The processes that run this command: `count` of them, of which this is number `index`."""

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count
        self._pulse: Pulse | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def wait(self, name: str) -> None:
        """A barrier: returns when all processes have called it with this name."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def require_same(self, **texts: str) -> None:
        """Raises InputError in every process if a text (by its name in the message) differs between
        processes; names the first that differs from process 0."""
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

    def watch(self) -> None:
        """Starts ending this process, with a message, when another one goes missing."""
        if self.count > 1 and self._pulse is None:
            self._pulse = Pulse(KeyValueStore(), self.index, self.count, patience_seconds())
            self.wait("pulse")
            self._pulse.start()
            if guarded := os.environ.get(GUARDED):
                os.write(int(guarded), self._pulse.host_of(0).encode())

    def end(self, reason: str = "") -> None:
        """Tells the others that this process ends, and why if it did not finish."""
        if self._pulse is not None:
            self._pulse.stop(reason)

    def fail(self, sentence: str) -> None:
        """Ends this process at once, from any thread, with exit code 1, if there are others, which
        are told why; the main thread may be blocked, waiting for them."""
        if self._pulse is not None:
            self._pulse.fail(sentence)

    def wait_for_missing(self) -> None:
        """After an error that a missing process may have caused: waits long enough to detect that,
        which ends this process."""
        if self._pulse is not None:
            self._pulse.wait()


def raise_together(sentence: str) -> None:
    """Raises InputError in every process if one has a sentence, with the first of them. All
    processes must call it, those with "" too."""
    import numpy as np
    from jax.experimental import multihost_utils

    own_N = np.frombuffer(sentence.encode().ljust(_SENTENCE_BYTES)[:_SENTENCE_BYTES], np.uint8)
    all_PxN = np.atleast_2d(multihost_utils.process_allgather(own_N))
    sentences = (each_N.tobytes().decode(errors="ignore").strip() for each_N in all_PxN)
    if found := next(filter(None, sentences), ""):
        raise InputError(found)


def are_several(settings: Mapping[str, str]) -> bool:
    """Whether flags or the environment name other processes; see `join`."""
    given = _given(settings)
    return given["multi_process"] in _TRUE or any(given[name] for name in FLAGS[:3])


def join(settings: Mapping[str, str], saves_on_request: bool = False) -> Processes:
    """Joins the other processes; call it before anything asks JAX for devices.

    Args:
      settings: The FLAGS that were typed; SALT_COORDINATOR_ADDRESS, … replace missing ones.
        Without any, this is the only process; with multi_process=True JAX detects the others (TPU
        VMs, GKE, SLURM, Open MPI).
      saves_on_request: Whether the verb calls `multihost_utils.reached_preemption_sync_point`.

    Raises:
      InputError: Some of the three flags are missing or invalid, or the processes have different
        numbers of devices.
      RunFailed: The others did not arrive.
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
            f"--{missing[0]}=VALUE, or --multi_process=True alone where JAX can detect them."
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
                f"process_index is {index} of {count} processes, numbered from 0: change "
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

    # jax's service would handle SIGTERM, but only `salt train` polls it for one.
    jax.config.update("jax_enable_preemption_service", saves_on_request)
    # Longer than the pulse's patience, so that the missing process is named before jax aborts.
    heartbeat = max(100, round(2 * patience_seconds()))
    try:
        jax.distributed.initialize(
            **known, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(  # so that launchers retry: a host may only be slow
            f"The processes did not meet ({reason}): start as many as --process_count says, each "
            "with its own --process_index and the address of process 0 as --coordinator_address."
        ) from error
    # With unequal device counts no collective would work, not even one to report the error.
    devices = collections.Counter(device.process_index for device in jax.devices())
    fewest, most = (choose(devices, key=lambda index: devices[index]) for choose in (min, max))
    if devices[fewest] != devices[most]:
        raise InputError(
            f"Process {fewest} has {devices[fewest]} devices and process {most} has "
            f"{devices[most]}: give each process as many (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS, "
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
