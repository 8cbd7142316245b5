"""An output folder in a bucket: written on this machine's disk, and sent there as it grows.

In: the URL of --output_dir. Out: a folder on the disk, which begins as what the bucket holds, so
that a run goes on where one on another machine has ended; what changes in it is sent every half
minute and at the end, a checkpoint or a shard once it is complete, and what it removes is removed.
A bucket that cannot be reached for a while is told of and tried again.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence

from salt_jax.data.buckets import BucketError, RemoteFile, RemoteFolder, checkpoint_of
from salt_jax.data.local_copies import Copied, Copy, changed_ns, copy_below
from salt_jax.data.manifests import COMPLETED_FILE
from salt_jax.errors import InputError, RunFailed
from salt_jax.run_lock import RunLock

SEND_SECONDS = "SALT_SEND_SECONDS"

_TRIES = 5
# What only this machine has a use for: locks, what is being written, parts of an unfinished cache.
_OWN_FOLDERS = ("processes", "work")
_UNFINISHED = (".orbax-checkpoint-tmp", ".tmp")


class Mirror:
    """Used as a context, which gives the folder to write into and ends when all has been sent.

    Args:
      url: gs://BUCKET/PATH or s3://BUCKET/PATH.
      verb: The verb that writes it, for other processes of this machine, which are kept out.

    Raises:
      InputError: See RemoteFolder.
    """

    def __init__(self, url: str, verb: str) -> None:
        self._folder = RemoteFolder(url)
        self._verb, self._lock = verb, RunLock()
        self.path = copy_below("output", self._folder)
        self._copy = Copy(self._folder, self.path)
        self._known: dict[str, Copied] = {}
        self._seconds = _seconds()
        self._ended = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")

    def __enter__(self) -> pathlib.Path:
        """Brings the folder to what the bucket holds, if anything else wrote there.

        Raises:
          InputError: Another process writes it.
          BucketError: The bucket cannot be read.
        """
        there = self._folder.files()
        self._lock.acquire(self.path, self._verb, at=self._copy.control)
        self._known = self._copy.known()
        if not self._is_ours(there):
            self._take(there)
            self._known = self._copy.known()
        self._thread.start()
        return self.path

    def _is_ours(self, there: Mapping[str, RemoteFile]) -> bool:
        """Whether the bucket holds what was sent from here; what was being sent when this machine
        stopped may be there or not."""
        known = self._known
        settled = {name: copied.there for name, copied in known.items() if copied.there}
        unsettled = known.keys() - settled.keys()
        return settled == {name: file for name, file in there.items() if name not in unsettled}

    def _take(self, there: Mapping[str, RemoteFile]) -> None:
        """Makes the folder what the bucket holds, whose half-sent checkpoints go."""
        whole = {checkpoint_of(name) for name in there if name.endswith("/digests.json")}
        self._folder.remove(
            name for name in there if checkpoint_of(name) and checkpoint_of(name) not in whole
        )
        for name in self._states().keys() - there.keys():
            self._copy.drop(name)
        self._copy.fetch()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._send_rest(error)

    def _send_rest(self, error: BaseException | None) -> None:
        for left in reversed(range(_TRIES)):
            try:
                self._send()
                break
            except BucketError as failed:
                if left:
                    continue
                sentence = (
                    f"{failed} What was not sent is in {self.path}: run the same command on this "
                    "machine again to send it"
                )
                if error is None:
                    raise RunFailed(f"{sentence}.") from failed
                print(f"salt: {sentence}.", file=sys.stderr)
        if not self._failing and self._known:
            print(f"All of it is in {self._folder.url}", flush=True)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._send()
                self._failing = False
            except (BucketError, OSError) as error:
                if not self._failing:
                    print(f"salt: {error} It is tried again.", file=sys.stderr, flush=True)
                self._failing = True

    def _send(self) -> None:
        """Brings the bucket to what the folder holds."""
        now, known = self._states(), self._known
        gone = [name for name in known if name not in now]
        changed = [
            name
            for name, state in now.items()
            if name not in known or not known[name].there or known[name].changed_ns != state
        ]
        if not changed and not gone:
            return
        with self._held(changed) as (folder, changed):
            known |= {name: Copied(None, now.get(name, -1)) for name in (*changed, *gone)}
            self._copy.note(known)
            self._folder.remove(name for name in gone if name.rpartition("/")[2] == COMPLETED_FILE)
            self._folder.put(folder, changed)
        there = self._folder.files()
        known |= {name: Copied(there.get(name), now[name]) for name in changed}
        self._folder.remove(gone)  # after a checkpoint that takes their place
        for name in gone:
            del known[name]
        self._copy.note(known)

    @contextlib.contextmanager
    def _held(self, names: Sequence[str]) -> Iterator[tuple[pathlib.Path, list[str]]]:
        """A folder in which files stay as long as sending takes, whatever the run removes, and
        those that are there: of a checkpoint all or none."""
        folder, removed = self._copy.control / "sending", set()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self.path / name, folder / name)
                except FileNotFoundError:
                    removed.add(checkpoint_of(name) or name)
            yield folder, [name for name in names if (checkpoint_of(name) or name) not in removed]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _states(self) -> dict[str, int]:
        """The time of change of every file that is complete, by name."""
        states = {}
        for path in sorted(self.path.rglob("*")) if self.path.is_dir() else ():
            parts = path.relative_to(self.path).parts
            if not _is_own(parts) and path.is_file() and (state := changed_ns(path)) >= 0:
                states["/".join(parts)] = state
        return states


def _seconds() -> float:
    given = os.environ.get(SEND_SECONDS) or "30"
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{SEND_SECONDS} is {given!r}, expected seconds above 0: correct it.")
    return seconds


def _is_own(parts: tuple[str, ...]) -> bool:
    """Whether a file stays on this machine."""
    unfinished = any(mark in part for part in parts for mark in _UNFINISHED)
    return unfinished or parts[-1].startswith(".") or any(part in _OWN_FOLDERS for part in parts)
