"""Runs jobs on this machine, in this process or in worker processes that end with it."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from salt_jax.errors import Interrupted, RunFailed
from salt_jax.runtime import output_streams
from salt_jax.runtime.stop_signals import stop_signals, stop_signals_handled_by
from salt_jax.terminal import ProgressBar

_MOST_WORKERS = 64  # by default; the disk limits more
_POLL_SECONDS = 0.2


class Progress(NamedTuple):
    """The documents and tokens that a finished job has read."""

    documents: int
    tokens: int


def run_locally(
    function: Callable[[Any], Progress],
    jobs: Sequence[Any],
    title: str,
    done: int,
    workers: int | None = None,
) -> None:
    """Calls the function with each job, in `workers` processes (1: in this one; None: one per
    usable core); see `JobRunner.run`."""
    workers = min(workers or _usable_cores(), len(jobs))
    with ProgressBar(title, done + len(jobs), done) as display:
        if done and jobs:
            display.say(f"{done} are finished, {len(jobs)} are left.")
        started, documents, tokens = time.monotonic(), 0, 0

        def show(finished: Progress) -> None:
            nonlocal documents, tokens
            documents, tokens = documents + finished.documents, tokens + finished.tokens
            rate = tokens / max(time.monotonic() - started, 1e-3)
            display.add(status=f"{documents:,} documents  {rate:,.0f} tokens/s")

        if workers > 1:
            _run_in_processes(function, jobs, workers, show)
            return
        for job in jobs:
            show(function(job))


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def _run_in_processes(
    function: Callable[[Any], Progress],
    jobs: Sequence[Any],
    workers: int,
    show: Callable[[Progress], None],
) -> None:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pending: set[concurrent.futures.Future[Progress]] = set()
    requests: list[str] = []  # names of stop signals, so that workers are ended before this process
    with stop_signals_handled_by(lambda number, _: requests.append(signal.Signals(number).name)):
        # Workers start with stop signals blocked, then set their own handlers. Also keeps SIGHUP
        # from multiprocessing's resource tracker, which starts with the first worker.
        with _signals_blocked():
            pool = concurrent.futures.ProcessPoolExecutor(
                workers, mp_context=context, initializer=_end_with_parent
            )
        try:
            with _signals_blocked():
                pending = {pool.submit(function, job) for job in jobs}
            while pending and not requests:
                finished, pending = concurrent.futures.wait(
                    pending, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    show(future.result())
        except concurrent.futures.BrokenExecutor as error:
            raise RunFailed(
                "a worker process was killed, perhaps for lack of memory: lower --workers, which "
                "keeps what is finished, or raise --shards, which starts over."
            ) from error
        finally:
            # After a failure, don't wait for the other jobs.
            if pending:
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
            pool.shutdown(cancel_futures=True)
    if requests:
        raise Interrupted(f"stopped by {requests[0]}: run the same command again to resume.")


def _end_with_parent() -> None:
    """Ends this worker when its parent ends; terminal signals are left to the parent."""
    output_streams.install()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    # The library's threads would compete with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker process has a parent"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
