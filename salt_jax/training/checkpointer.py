"""Saves and restores the checkpoints of a run by Orbax, asynchronously and atomically."""

import contextlib
import errno
import itertools
import json
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from salt_jax.errors import RunFailed
from salt_jax.runtime.key_value_store import KeyValueStore
from salt_jax.storage.buckets import BucketError, as_bucket_errors, bucket_error, is_remote
from salt_jax.storage.run_folder import UNFINISHED_CHECKPOINT
from salt_jax.training.checkpoint_digests import (
    COMMIT_MARK,
    check_together,
    is_committed,
    is_whole,
    own_digests,
    write_digests,
)
from salt_jax.training.checkpoint_items import ARRAYS, ITEMS, item_handlers, reading
from salt_jax.training.checkpoints import CheckpointConfig, checkpoints_of, complete_steps
from salt_jax.training.train_state import StateLayout, TrainState

_CHUNK_BYTES = 8 << 20
_STORE_SECONDS = 10.0
_BY_FILE = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


class Checkpointer:
    """The checkpoints of one run.

    A checkpoint that the disk or the bucket refuses is reported, and the older ones stay; it ends
    a run of several processes, since those that wrote their part can't go on without the others.

    Args:
      run_path: The run's folder.
      config: When to save, what to keep.
      report: Called with a sentence about what went wrong.
      fail: Ends this process and the others, with a sentence; called in the background.
    """

    def __init__(
        self,
        run_path: pathlib.Path,
        config: CheckpointConfig,
        report: Callable[[str], None] = print,
        fail: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._folder = checkpoints_of(run_path)
        self._config, self._report, self._fail = config, report, fail
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._by_file = config.commit_by_file or is_remote(self._folder)
        self._saving: int | None = None
        self._lost: set[int | None] = set()
        if jax.process_index() == 0:
            self._finish_commits()
            self._finish_removals()
        multihost_utils.sync_global_devices("removals finished")  # before any lists the steps
        self._manager = self._open()

    def _finish_commits(self) -> None:
        """On disk, marks what was begun by `commit_by_file` and sealed before a kill, and removes
        what was not; Orbax does the latter in buckets."""
        if is_remote(self._folder) or not self._folder.is_dir():
            return
        for folder in [path for path in self._folder.iterdir() if path.name.isdigit()]:
            if not is_committed(folder):
                epath.Path(folder).rmtree()
            elif self._by_file:
                (folder / COMMIT_MARK).touch()

    def _finish_removals(self) -> None:
        """Removes what is left of older checkpoints whose removal a kill cut short."""
        with as_bucket_errors(self._folder, "written"):
            folders = {step: self._folder / str(step) for step in self._written()}
            if not folders or not is_whole(folders[max(folders)]):
                return  # the older ones may be needed
            for step in sorted(folders)[: -self._config.keep_last]:
                if not self._config.keeps(step) and not is_whole(folders[step]):
                    epath.Path(folders[step]).rmtree()

    def _open(self) -> ocp.CheckpointManager:
        config = self._config
        policies: list[Any] = [preservation_policy.LatestN(config.keep_last)]
        if config.keep_steps:
            policies.append(preservation_policy.CustomSteps(list(config.keep_steps)))
        if config.keep_every:
            policies.append(preservation_policy.EveryNSteps(config.keep_every))
        return ocp.CheckpointManager(
            self._folder,
            handler_registry=item_handlers(self._digest_own),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                atomicity_options=_BY_FILE if self._by_file else None,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._seal, barrier_sync_fn=self._wait_for_others
                ),
            ),
        )

    def _wait_for_others(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier. Its background thread comes here after an error too, while the others
        wait at an earlier one, unless only the removal of an older checkpoint failed."""
        is_main = threading.current_thread() is threading.main_thread()
        error = None if is_main else sys.exception()
        if error and not _is_of_a_lost_process(error) and self._saving not in self._written():
            self._fail(self._failure(self._reason(error) or f"{type(error).__name__}: {error}"))
        self._barrier(key=key, timeout_ms=timeout_ms)

    def _written(self) -> list[int]:
        """The steps of complete checkpoints; none if they can't be listed."""
        with contextlib.suppress(BucketError), as_bucket_errors(self._folder, "read"):
            return complete_steps(self._folder.parent)
        return []

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        """The steps of complete checkpoints, and of the one being written."""
        return [step for step in self._manager.all_steps() if step not in self._lost]

    def save(
        self, step: int, state: TrainState, progress: Mapping[str, Any], must: bool = True
    ) -> None:
        """Starts saving; training continues while files are written.

        `step` counts completed steps, and `progress` is saved beside the state. While the previous
        checkpoint is still being written this one is skipped, unless it is a `must` or to be kept,
        or there are several processes, which must agree.
        """
        if step in self._steps():
            return
        must = must or self._config.keeps(step) or jax.process_count() > 1
        if not must and self._manager.is_saving_in_progress():
            self._report(
                f"skipped the checkpoint of step {step}: that of step {self._saving} is still "
                "being written; save less often"
            )
            return
        self.wait()
        with self._surviving():
            self._start(step, state, progress)

    def _start(self, step: int, state: TrainState, progress: Mapping[str, Any]) -> None:
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(
                    state.params, save_args=jax.tree.map(_chunks, state.params)
                ),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
        )

    def _digest_own(self, item: str, folder: pathlib.Path) -> None:
        """Called in the background when this process has written its part of an item."""
        if jax.process_count() > 1:
            digests = own_digests(folder, item, jax.process_index())
            key = f"digests/{item}/{jax.process_index()}"
            KeyValueStore().put(key, json.dumps([self._saving, digests]))

    def _seal(self) -> None:
        """Called by Orbax when a checkpoint's files are written, before the folder is renamed or
        marked as complete."""
        if jax.process_index() > 0:
            return
        known: dict[str, str] = {}
        for item, process in itertools.product(ARRAYS, range(jax.process_count())):
            if jax.process_count() > 1:  # all have called `_digest_own`
                told = KeyValueStore().get(f"digests/{item}/{process}", _STORE_SECONDS)
                step, digests = json.loads(told or "[null, {}]")
                known |= digests if step == self._saving else {}
        folder = self._folder / str(self._saving)
        if not self._by_file:
            (folder,) = self._folder.glob(f"{self._saving}{UNFINISHED_CHECKPOINT}*")
        write_digests(folder, ITEMS, known)

    def restore(self, layout: StateLayout, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The whole state, sharded as in `layout`, and the progress saved with it.

        Raises:
          InputError: The checkpoint is damaged.
        """
        check_together(self._folder / str(step), ITEMS)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(layout.abstract.params),
            optimizer=ocp.args.StandardRestore(_optimizer_item(layout.abstract)),
            progress=ocp.args.JsonRestore(),
        )
        with reading(self._folder / str(step)):
            restored = self._manager.restore(step, args=args)
        state = TrainState(params=restored["params"], **restored["optimizer"])
        return state, restored["progress"]

    def wait(self) -> None:
        """Waits until every checkpoint is on disk or reported as failed."""
        with self._surviving():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then frees Orbax's resources."""
        with self._surviving():
            self._manager.close()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Reports a full disk or a bucket's error, and reopens the manager, which still lists the
        lost step; if that can't be reached either, later."""
        try:
            yield
            return
        except Exception as error:
            reason = self._reason(error)
            if not reason:
                raise
            if self._saving in self._written():
                self._report(f"a checkpoint before step {self._saving} is not removed: {reason}")
                self._manager.reload()  # it has forgotten the new one
                return
            if jax.process_count() > 1:
                raise RunFailed(self._failure(reason)) from error
        self._lost.add(self._saving)
        with contextlib.suppress(BucketError), as_bucket_errors(self._folder, "read"):
            self._manager = self._open()
            self._lost.clear()
        newest = self.latest_step()
        self._report(
            f"THE CHECKPOINT OF STEP {self._saving} COULD NOT BE WRITTEN: {reason} Training "
            f"continues, and the newest checkpoint is "
            f"{f'that of step {newest}' if newest is not None else 'none'}. It will be "
            "tried again with the next checkpoint."
        )

    def _failure(self, reason: str) -> str:
        return (
            f"The checkpoint of step {self._saving} could not be written: {reason} Run the same "
            "command on every host again to resume from an older one."
        )

    def _reason(self, error: BaseException) -> str:
        """Why the disk or the bucket did not take a checkpoint; "" for an error of another kind."""
        if _is_of_a_lost_process(error):
            return ""
        if refused := bucket_error(self._folder, "written", error):
            return str(refused)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error) or "quota" in str(error)
        return f"no space left on the disk of {self._folder}: make room." if full else ""


def _is_of_a_lost_process(error: BaseException) -> bool:
    """Whether an error comes of waiting for another process, which its missing beat names."""
    lost = jax.errors.JaxRuntimeError
    return isinstance(error, lost) or isinstance(error.__cause__, lost)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """A state's fields without its parameters."""
    fields = {**state._asdict(), "params": None}
    return {name: value for name, value in fields.items() if value is not None}


def _chunks(leaf: jax.Array) -> ocp.SaveArgs:
    """Small chunks, a layer each where layers are stacked, so that leaves can be read in parts."""
    if leaf.nbytes <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())
