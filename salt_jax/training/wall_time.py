"""Wall time of a run by what it was spent on, over all its starts; the share of steps is goodput.

Every moment of a start belongs to one part, so that the parts add up to the wall time.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

# `rows` is waiting for rows while no step runs, `lost_steps` steps that were computed again.
PARTS = ("steps", "start", "compile", "restore", "save", "evaluation", "rows", "lost_steps")
_COMPILED = "/jax/core/compile/backend_compile_duration"


class WallTime:
    """The account of one process; as a context it hears of what XLA compiles.

    Args:
      began: `time.perf_counter()` when the command was started.
      chips: The number of devices.
      price: The price of a chip-hour; None if unknown.
    """

    def __init__(self, began: float, chips: int, price: float | None) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._mark, self._chips, self._price = began, chips, price
        self._otherwise, self._compiled = "start", 0.0
        self._starts, self._chip_hours_before, self._seconds_before = 1, 0.0, 0.0

    def __enter__(self) -> "WallTime":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self._compiled += duration_secs

    def resume(self, saved: Mapping[str, Any] | None, recorded: Mapping[str, Any] | None) -> None:
        """Continues the account of earlier starts.

        Args:
          saved: `to_json` in the checkpoint to resume from; None at step 0.
          recorded: The last `to_json` in the run's metrics; steps after the checkpoint are lost.
        """
        latest = max(filter(None, (saved, recorded)), key=lambda x: x["wall_seconds"], default=None)
        if latest is None:
            return
        for part in PARTS:
            self.seconds[part] += latest[f"{part}_seconds"]
        lost = latest["steps_seconds"] - (saved["steps_seconds"] if saved else 0.0)
        self.seconds["steps"] -= lost
        self.seconds["lost_steps"] += lost
        self._starts += latest["starts"]
        self._chip_hours_before, self._seconds_before = latest["chip_hours"], latest["wall_seconds"]

    def lap(self, part: str) -> None:
        """Counts the time since the last lap as a part's, but what XLA compiled as `compile`'s."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        compiled, self._compiled = min(self._compiled, seconds), 0.0
        self.seconds["compile"] += compiled
        self.seconds[part] += seconds - compiled

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Counts the time inside the context as a part's."""
        self.lap(self._otherwise)
        yield
        self.lap(part)

    def begin_steps(self) -> None:
        """From now on, time that is not spent on another part is that of steps."""
        self.lap(self._otherwise)
        self._otherwise = "steps"

    def to_json(self, seconds_left: float = 0.0) -> dict[str, Any]:
        """The account so far, for metrics, checkpoints and summary.json.

        Args:
          seconds_left: The time that the rest of the run is expected to take.
        """
        wall = sum(self.seconds.values())
        hours = self._chip_hours_before + self._chips * (wall - self._seconds_before) / 3600
        account = {
            "goodput": self.seconds["steps"] / wall,
            "starts": self._starts,
            "wall_seconds": wall,
            **{f"{part}_seconds": seconds for part, seconds in self.seconds.items()},
            "chip_hours": hours,
            "seconds_left": seconds_left,
        }
        if self._price is not None:
            left = self._chips * seconds_left / 3600
            account["cost"] = self._price * hours
            account["cost_at_end"] = self._price * (hours + left)
        return account
