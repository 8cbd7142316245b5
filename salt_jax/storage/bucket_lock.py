"""A lock in a bucket, which keeps two launches from writing one folder, also from two machines.

It is an object that its owner rewrites every few seconds. Object stores write an object only if it
has the generation that the request names, so of two processes that want it one gets it. An owner
whose object stays the same for SALT_MISSING_SECONDS is dead, and is replaced; clocks are never
compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import INTERRUPTED
from salt_jax.runtime.output_streams import tell_at_once
from salt_jax.runtime.pulse import patience_seconds
from salt_jax.storage.buckets import BucketError, change_if, read_object
from salt_jax.terminal import say

_BEATS = 5  # sent in the time after which an owner counts as dead


class HeldElsewhereError(Exception):
    """Another process holds the lock; its argument is the owner."""


class BucketLock:
    """The lock `url`, for an owner that is described by its verb, "pid" and "host"."""

    def __init__(self, url: str, owner: Mapping[str, Any]) -> None:
        self._url = url
        self._text = json.dumps({**owner, "token": secrets.token_hex(8)}).encode()
        self._patience = patience_seconds()
        self._generation = ""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="lock")

    def acquire(self) -> None:
        """Takes the lock, after waiting to see whether its owner is dead.

        Raises:
          HeldElsewhereError: The owner is alive.
          BucketError: The bucket cannot be written.
        """
        generation = "0"
        while not self._write(generation):
            generation, text = read_object(self._url)
            owner = json.loads(text or b"{}")
            if generation != "0" and not _is_dead_here(owner):
                generation = self._await_change(generation, owner)
        self._thread.start()

    def release(self) -> None:
        """Removes the lock's object."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(BucketError):  # then it counts as dead before long
            change_if(self._url, self._generation, None)

    def _await_change(self, generation: str, owner: Mapping[str, Any]) -> str:
        """Waits until an owner has released the lock or counts as dead; the generation then."""
        say(
            f"{self._url} is of `salt {owner['verb']}` (process {owner['pid']} on "
            f"{owner['host']}): waiting up to {self._patience:g} s to see whether it has ended"
        )
        began = time.monotonic()
        while time.monotonic() - began < self._patience:
            time.sleep(self._patience / _BEATS)
            now, _ = read_object(self._url)
            if now == "0":
                return now
            if now != generation:
                raise HeldElsewhereError(owner)
        return generation

    def _write(self, generation: str) -> bool:
        written = change_if(self._url, generation, self._text)
        if not written:  # perhaps by an earlier try of this very request, whose answer was lost
            found, text = read_object(self._url)
            written = found if text == self._text else ""
        self._generation = written or self._generation
        return bool(written)

    def _beat_on(self) -> None:
        while not self._released.wait(self._patience / _BEATS):
            with contextlib.suppress(BucketError):
                if not self._write(self._generation):
                    self._end()

    def _end(self) -> None:
        """Ends the process, whose lock is not its own any more, before it writes anything more."""
        from salt_jax.storage.run_folder import RUN_FILE

        folder, is_emptied = self._url.rpartition("/")[0], False
        with contextlib.suppress(BucketError):
            left = [read_object(url)[0] for url in (self._url, f"{folder}/{RUN_FILE}")]
            is_emptied = left == ["0", "0"]
        if is_emptied:
            tell_at_once(
                f"{folder} was emptied under this run, which ends: restore its objects and run the "
                "same command again, or choose another --output_dir."
            )
            os._exit(2)
        tell_at_once(
            f"{self._url} was taken by another launch, while this one could not reach the bucket: "
            "this one ends."
        )
        os._exit(INTERRUPTED)


def _is_dead_here(owner: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
