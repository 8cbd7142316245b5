"""Mirrors an output folder to a bucket: it is written on local disk, and uploaded as it grows.

The local folder starts as a copy of the bucket's, so that a run on another machine can be resumed.
Changes are uploaded every half minute and at the end, checkpoints and shards once complete, and
removed files are removed there. While the bucket is unreachable the run continues, with a warning,
and the upload is retried.
"""

import contextlib
import os
import pathlib
import re
import shutil
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence

from salt_jax.errors import InputError, RunFailed
from salt_jax.runtime import environment
from salt_jax.storage.buckets import BucketError, RemoteFile, RemoteFolder, completes
from salt_jax.storage.durable_files import link_or_copy
from salt_jax.storage.local_copies import Copied, Copy, FileState, copy_below, state_on_disk
from salt_jax.storage.manifests import COMPLETED_FILE, DIGESTS_FILE
from salt_jax.storage.run_folder import RUN_FILE, UNFINISHED_CHECKPOINT
from salt_jax.storage.run_lock import RunLock
from salt_jax.terminal import say, warn

SEND_SECONDS = "SALT_SEND_SECONDS"

_TRIES = 5
# Not mirrored: messages between a run's processes (older versions), parts of an unfinished cache.
_OWN_FOLDERS = ("processes", "work")


class Mirror:
    """A context that mirrors the local folder `path` to a bucket's folder, and ends when everything
    has been uploaded; other processes of this machine are locked out.

    Raises:
      InputError: See RemoteFolder.
    """

    def __init__(self, url: str, verb: str) -> None:
        self._folder = RemoteFolder(url)
        self._verb, self._lock = verb, RunLock()
        self.path = copy_below("output", self._folder)
        self._copy = Copy(self._folder, self.path)
        self._known: dict[str, Copied] = {}
        self._left_out: set[str] = set()
        self._seconds = environment.seconds(SEND_SECONDS, "30")
        self._ended = threading.Event()
        self._sending = threading.Lock()
        self._failing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")

    def __enter__(self) -> "Mirror":
        """Updates the local folder from the bucket, if another machine wrote there.

        Raises:
          InputError: Another process is writing it, or the bucket has lost uploaded files.
          BucketError: The bucket cannot be read.
        """
        self._lock.acquire(self.path, self._verb, at=self._copy.control)
        try:
            self._begin(self._folder.files())
        except BaseException:
            self._lock.release()
            raise
        self._thread.start()
        return self

    def _begin(self, there: Mapping[str, RemoteFile]) -> None:
        whole = {_checkpoint_of(name) for name in there if name.endswith(f"/{DIGESTS_FILE}")}
        self._left_out = {name for name in there if _checkpoint_of(name) not in {"", *whole}}
        self._known = known = self._copy.known()
        settled = {name: copied.there for name, copied in known.items() if copied.there}
        if settled and not there:
            raise InputError(
                f"There is nothing in {self._folder.url}, and {len(settled)} files were sent there "
                "from this machine: check the bucket's name and whose credentials are used; or "
                f"delete {self.path.parent} to begin anew."
            )
        # Files that were being sent when this machine stopped may have arrived or not.
        passed_over = (known.keys() - settled.keys()) | (self._left_out - settled.keys())
        if settled != {name: file for name, file in there.items() if name not in passed_over}:
            self._take()

    def _take(self) -> None:
        """Updates the local folder from the bucket, without incomplete checkpoints."""
        if unsent := self._unsent(self._states()):
            kept = self._copy.control / f"unsent-{time.time_ns()}"
            os.replace(self.path, kept)
            self._copy.note({})
            warn(
                f"{self._folder.url} was written to from elsewhere and takes precedence: "
                f"{len(unsent)} files that were not sent are in {kept}"
            )
        self._copy.fetch(lambda name: name not in self._left_out)
        self._known = self._copy.known()

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
                self.send()
                if self._is_there():
                    break
                failed: Exception = BucketError(f"{self._folder.url} is written to from elsewhere.")
            except (InputError, OSError) as caught:
                failed = caught
            if not left:
                if error is not None and not self.path.exists():
                    return  # nothing was begun
                sentence = (
                    f"{failed} What was not sent is in {self.path}: run the same command on this "
                    "machine again to send it"
                )
                if error is None:
                    raise RunFailed(f"{sentence}.") from failed
                warn(f"{sentence}.")
                return
        if self._known:
            say(f"All of it is in {self._folder.url}")

    def _is_there(self) -> bool:
        """Whether the bucket holds what was sent; missing files will be sent again."""
        there = self._folder.files() if self._known else {}
        lost = [
            name
            for name, copied in self._known.items()
            if not copied.there or there.get(name) != copied.there
        ]
        self._known |= {name: Copied(None, self._known[name].here) for name in lost}
        return not lost

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.send()
                self._failing = False
            except (InputError, OSError) as error:
                if not self._failing:
                    warn(f"{error} It will be tried again.")
                self._failing = True

    def send(self) -> None:
        """Updates the bucket from the local folder; BucketError if it cannot be written."""
        with self._sending:
            self._send(self._states())

    def _send(self, now: Mapping[str, FileState]) -> None:
        known = self._known
        gone = [name for name in known if name not in now]
        changed = self._unsent(now)
        if not changed and not gone:
            return
        with self._held(changed) as (folder, changed):
            # First remove leftovers of a partial upload of the checkpoint.
            anew = {_checkpoint_of(name) for name in changed}
            left = self._left_out - now.keys()
            stale = {name for name in left if _checkpoint_of(name) in anew}
            # A run that has a new checkpoint has no other writer: what another left half-sent or
            # half-removed goes too.
            runs = {step.rpartition("/")[0] for step in anew - {""}}
            half = {name for name in left if _checkpoint_of(name).rpartition("/")[0] in runs}
            marks = [name for name in changed if completes(name) and name in known]
            marks += [name for name in gone if name.rpartition("/")[2] == COMPLETED_FILE]
            known |= {name: Copied(None, now.get(name, ())) for name in (*changed, *gone)}
            self._copy.note(known)
            self._folder.remove({*marks, *stale})
            self._folder.put(folder, changed)
        there = self._folder.files()
        known |= {name: Copied(there.get(name), now[name]) for name in changed}
        self._folder.remove({*gone, *(half - stale)})  # after a checkpoint that replaces them
        for name in gone:
            del known[name]
        self._left_out -= half
        self._copy.note(known)

    def _unsent(self, now: Mapping[str, FileState]) -> list[str]:
        """The files whose current state is not in the bucket."""
        known = self._known
        return [
            name
            for name, state in now.items()
            if name not in known or not known[name].there or known[name].here != state
        ]

    @contextlib.contextmanager
    def _held(self, names: Sequence[str]) -> Iterator[tuple[pathlib.Path, list[str]]]:
        """A temporary folder of links that protects files from removal by the run while they are
        sent, and the files in it (all or none of a checkpoint's)."""
        folder, removed = self._copy.control / "sending", set()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    link_or_copy(self.path / name, folder / name)
                except FileNotFoundError:
                    removed.add(_checkpoint_of(name) or name)
            yield folder, [name for name in names if (_checkpoint_of(name) or name) not in removed]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _states(self) -> dict[str, FileState]:
        """The state of every file that is complete, by name."""
        states = {}
        for folder, folders, files in os.walk(self.path):
            own = _OWN_FOLDERS if RUN_FILE in files else ()
            folders[:] = [
                name for name in folders if name not in own and UNFINISHED_CHECKPOINT not in name
            ]
            place = pathlib.Path(folder)
            for name in files:
                if name.startswith(".") or name.endswith(".tmp"):
                    continue
                if state := state_on_disk(place / name):
                    states[(place / name).relative_to(self.path).as_posix()] = state
        return states


def _checkpoint_of(name: str) -> str:
    """The checkpoint that a file belongs to, "RUN/checkpoints/STEP", or ""."""
    found = re.match(r"(?:.*/)?checkpoints/\d+(?=/)", name)
    return found[0] if found else ""
