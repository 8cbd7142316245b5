"""A temporary local folder whose files are sent to a bucket's folder, whole, as they grow: object
stores can't append."""

import concurrent.futures
import os
import pathlib
import tempfile
import time

from salt_jax.errors import RunFailed
from salt_jax.runtime import environment
from salt_jax.storage.buckets import BucketError, RemoteFolder
from salt_jax.terminal import warn

SEND_SECONDS = "SALT_SEND_SECONDS"


class Outbox:
    """The local folder `path` for files of the bucket's folder `url`.

    While the bucket is unreachable the run continues, with a warning, and sends later.
    """

    def __init__(self, url: str) -> None:
        self._folder = RemoteFolder(url)
        self._temporary = tempfile.TemporaryDirectory(prefix="salt_jax_")
        self.path = pathlib.Path(self._temporary.name)
        self._seconds = environment.seconds(SEND_SECONDS, "30")
        self._sent: dict[str, tuple[int, int]] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future[None] | None = None
        self._since = time.monotonic()
        self._failing = False

    def send(self, now: bool = False) -> None:
        """Sends what has changed, in the background; without `now` every SALT_SEND_SECONDS."""
        is_due = now or time.monotonic() - self._since >= self._seconds
        if is_due and (self._pending is None or self._pending.done()):
            self._since = time.monotonic()
            self._pending = self._executor.submit(self._try_to_send)

    def close(self) -> None:
        """Sends the rest, and removes the local folder.

        Raises:
          RunFailed: The bucket cannot be written.
        """
        self._executor.shutdown()
        try:
            self._send()
        except BucketError as error:
            raise RunFailed(f"{error} The newest records of the run are lost.") from error
        finally:
            self._temporary.cleanup()

    def _try_to_send(self) -> None:
        try:
            self._send()
            self._failing = False
        except BucketError as error:
            if not self._failing:
                warn(f"{error} It will be tried again.")
            self._failing = True

    def _send(self) -> None:
        states = {}
        for folder, _, files in os.walk(self.path):
            for name in files:
                path = pathlib.Path(folder, name)
                status = path.stat()
                name = path.relative_to(self.path).as_posix()
                states[name] = status.st_size, status.st_mtime_ns
        changed = [name for name, state in states.items() if self._sent.get(name) != state]
        if changed:
            self._folder.put(self.path, changed)
            self._sent = states
