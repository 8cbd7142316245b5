"""Jobs on this machine: in this process, or in several of their own.

In: a function of a module, jobs that can be pickled. Out: every job done, or the first error that
one of them raised, as it was. Processes end with this one, however it ends.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from salt_jax.errors import Interrupted, RunFailed
from salt_jax.preparation.mapping import Progress
from salt_jax.runtime import output_streams
from salt_jax.runtime.stop_signals import stop_signals, stop_signals_handled_by
from salt_jax.terminal import ProgressBar

_MOST_WORKERS = 64
_POLL_SECONDS = 0.2


def default_workers() -> int:
    """The cores that this process may use, 64 at most: beyond that the disk is what is waited
    for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def run_locally(
    function: Callable[[Any], Progress],
    jobs: Sequence[Any],
    title: str,
    done: int,
    *,
    workers: int,
) -> None:
    """Calls the function with every job.

    Args:
      function: Of a module, so that other processes find it.
      jobs: Its arguments.
      title: What they are.
      done: Jobs that were finished before.
      workers: Processes; 1 runs the jobs in this one.

    Raises:
      Interrupted: A signal to stop came while other processes worked.
      RunFailed: A process was killed.
      Whatever the function raises.
    """
    with ProgressBar(title, done + len(jobs), done) as display:
        if done and jobs:
            display.say(f"{done} are finished, {len(jobs)} are left.")
        tell = _telling(display)
        if workers == 1 or len(jobs) <= 1:
            for job in jobs:
                tell(function(job))
            return
        _run_in_processes(function, jobs, min(workers, len(jobs)), tell)


def _telling(display: ProgressBar) -> Callable[[Progress], None]:
    """What shows that a job is finished, with all documents so far and the tokens a second."""
    started, finished = time.monotonic(), Progress(0, 0)

    def tell(counts: Progress) -> None:
        nonlocal finished
        finished = Progress(*(before + new for before, new in zip(finished, counts, strict=True)))
        rate = finished.tokens / max(time.monotonic() - started, 1e-3)
        display.add(status=f"{finished.documents:,} documents  {rate:,.0f} tokens/s")

    return tell


def _run_in_processes(
    function: Callable[[Any], Progress],
    jobs: Sequence[Any],
    workers: int,
    tell: Callable[[Progress], None],
) -> None:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pending: set[concurrent.futures.Future[Progress]] = set()
    with _stop_requests() as requests:
        with _signals_held():  # multiprocessing's tracker of resources would heed SIGHUP
            pool = concurrent.futures.ProcessPoolExecutor(
                workers, mp_context=context, initializer=_end_with_parent
            )
        try:
            with _signals_held():
                pending = {pool.submit(function, job) for job in jobs}
            while pending and not requests:
                finished, pending = concurrent.futures.wait(
                    pending, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    tell(future.result())
        except concurrent.futures.BrokenExecutor as error:
            raise RunFailed(
                "a worker process was killed, for want of memory perhaps: lower --workers, what is "
                "finished is kept; or raise --shards, with which the text is mapped anew."
            ) from error
        finally:
            # Where something failed, what the others are at is not waited for.
            if pending:
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
            pool.shutdown(cancel_futures=True)
    if requests:
        raise Interrupted(f"stopped by {requests[0]}: run the same command again to go on.")


def _end_with_parent() -> None:
    """Ends this process as soon as its parent is gone; only the parent heeds a terminal."""
    output_streams.install()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    # The library's own threads would only get in the other processes' way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker process has a parent"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Lets processes start with the signals blocked, until they are ready to ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _stop_requests() -> Iterator[Sequence[str]]:
    """Collects signals to stop by name, so that the processes are ended before this one."""
    received: list[str] = []
    with stop_signals_handled_by(lambda number, _: received.append(signal.Signals(number).name)):
        yield received
