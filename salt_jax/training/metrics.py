"""The metrics of a run: metrics.jsonl, TensorBoard events, W&B, the status on the terminal."""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import RunFailed
from salt_jax.storage.buckets import is_remote
from salt_jax.storage.outbox import Outbox
from salt_jax.storage.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, to_json
from salt_jax.terminal import warn

# tensorboardX imports torch if it is installed, for graphs that are not used here. That would
# double the time that a command takes to start.
_torch_is_there = "torch" in sys.modules
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

if not _torch_is_there:
    del sys.modules["torch"]


class MetricWriter:
    """Appends records to RUN/metrics.jsonl and their numbers to RUN/tensorboard/.

    For a run in a bucket both are on local disk, and sent every SALT_SEND_SECONDS. With `writes`
    False, as in all processes but the first, records are dropped. Numbers go to a `wandb_run`
    (`begin_wandb`), too, if there is one.
    """

    def __init__(
        self, run_path: pathlib.Path, writes: bool = True, wandb_run: Any | None = None
    ) -> None:
        self._writes, self._disk_was_full, self._wandb_run = writes, False, wandb_run
        self._outbox: Outbox | None = None
        if not writes:
            return
        if is_remote(run_path):
            self._outbox = Outbox(os.fspath(run_path))
            before, run_path = run_path / METRICS_FILE, self._outbox.path
            if before.exists():
                (run_path / METRICS_FILE).write_bytes(before.read_bytes())
        self._path = run_path / METRICS_FILE
        if self._path.exists():
            _drop_half_a_line(self._path)
        # Unbuffered, so that a line that a full disk refuses isn't written again.
        self._file = self._path.open("ab", buffering=0)
        (run_path / TENSORBOARD_FOLDER).mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread ends when the disk is full: whoever writes then waits.
        self._events = EventsWriter(str(run_path / TENSORBOARD_FOLDER / "events"))

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, which has at least `kind` and `step`."""
        if not self._writes:
            return
        numbers = {f"{record['kind']}/{name}": value for name, value in _flat(record)}
        if self._wandb_run is not None:
            self._wandb_run.log(numbers, step=record["step"])
        if self._append(to_json(record) + "\n"):
            self._write_event(record["step"], numbers)
        if self._outbox is not None:
            self._outbox.send()

    def send(self) -> None:
        """Sends records to the bucket, if the run is in one, before a checkpoint that has them
        behind it."""
        if self._outbox is not None:
            self._outbox.send(now=True)

    def _write_event(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [value for name, x in numbers.items() for value in scalar(name, x).value]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            self._note_full_disk(error)

    def _append(self, line: str) -> bool:
        """Appends a whole line or nothing; returns whether to write events, too.

        Once the disk has been full, no more events are written.
        """
        size, text = self._path.stat().st_size, line.encode()
        try:
            if self._file.write(text) == len(text):
                return not self._disk_was_full
            os.truncate(self._path, size)
            self._note_full_disk()
        except OSError as error:
            os.truncate(self._path, size)
            self._note_full_disk(error)
        return False

    def _note_full_disk(self, error: OSError | None = None) -> None:
        if error is not None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        if not self._disk_was_full:
            sentence = f"THE DISK IS FULL: {self._path} will lack lines"
            warn(f"{sentence}, and TensorBoard events are no longer written: make room.")
        self._disk_was_full = True

    def close(self) -> None:
        """Flushes and closes both files."""
        if not self._writes:
            return
        self._file.close()
        with contextlib.suppress(OSError) if self._disk_was_full else contextlib.nullcontext():
            self._events.close()
        if self._outbox is not None:
            self._outbox.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except RunFailed as error:
            if kind is None:
                raise
            warn(str(error))  # and what went wrong before is the command's error
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=0 if kind is None else 1)


def status_of(record: Mapping[str, Any]) -> str:
    """A training record in one line, for the terminal."""
    mfu = f"  MFU {record['mfu']:.1%}" if record.get("mfu") is not None else ""
    spent = record["wall_time"]
    cost = f"  cost {spent['cost']:,.2f} of {spent['cost_at_end']:,.2f}" if "cost" in spent else ""
    return (
        f"stage {record['stage']}  loss {record['loss']:.3f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s{mfu}{cost}"
    )


def recorded(run_path: pathlib.Path, kind: str, step: int | None) -> dict[str, Any] | None:
    """The newest record of a kind, at a step if given, in RUN/metrics.jsonl; None without one."""
    path = run_path / METRICS_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in reversed(text[: text.rfind("\n") + 1].splitlines()):
        if f'"{kind}"' in line:
            record = json.loads(line)
            if record.get("kind") == kind and step in (None, record.get("step")):
                return dict(record)
    return None


def _drop_half_a_line(path: pathlib.Path) -> None:
    """Removes the partial last line that a killed run left."""
    with path.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers.append((prefix + name, float(value)))
    return numbers
