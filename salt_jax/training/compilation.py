"""What jax compiles: kept between runs, and counted.

In: a folder; out: the persistent compilation cache in it, so that what was compiled once is not
compiled again. And a counter of compilations, which tells that nothing stalls a run half-way.
"""

import functools

import jax

from salt_jax.storage.user_folders import writable
from salt_jax.terminal import warn

DEFAULT_FOLDER = "~/.cache/salt_jax/programs"

# jax reports these whenever it traces a function and whenever it makes a program, be it compiled
# or taken from the persistent cache.
_TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` (~ is the home folder); an empty name keeps none.

    Where it cannot be written, programs are compiled anew in each run, which is said.
    """
    if not folder:
        return
    try:
        path = writable(folder)
    except OSError as error:
        _tell_not_kept(folder, str(error.strerror))
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def _tell_not_kept(folder: str, reason: str) -> None:
    warn(
        f"{folder} cannot be written ({reason}): programs are compiled anew in each run; set "
        "--compilation_cache to a folder that can, or to nothing."
    )


class CompilationCounter:
    """Counts while it is entered, in all threads of this process.

    Attributes:
      traced: Functions traced, the parts of one program each by itself.
      compiled: Programs made, those from the persistent cache among them.
      seconds: Spent making them.
    """

    def __init__(self) -> None:
        self.traced = 0
        self.compiled = 0
        self.seconds = 0.0

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event == _TRACE_EVENT:
            self.traced += 1
        elif event == _COMPILE_EVENT:
            self.compiled += 1
            self.seconds += duration_secs
