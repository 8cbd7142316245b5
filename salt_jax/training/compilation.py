"""Options of XLA, and the persistent cache: compiled programs, kept between runs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from salt_jax.errors import InputError
from salt_jax.storage.buckets import is_remote, path_of
from salt_jax.storage.user_folders import writable
from salt_jax.terminal import warn

DEFAULT_FOLDER = "~/.cache/salt_jax/programs"

Options = tuple[tuple[str, bool | str], ...]  # pairs of name and value


def check_options(options: Options, device: jax.Device) -> None:
    """Raises InputError if the device's compiler doesn't know an option or refuses its value."""
    if not options:
        return
    if not all(len(pair) == 2 and isinstance(pair[1], bool | str) for pair in options):
        raise InputError(
            f"compiler_options is {options}, and pairs of a name and True, False or a text were "
            "expected: change --compiler_options."
        )
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(number).compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"The compiler for {device.device_kind} refuses one of compiler_options "
            f"({error!s:.200}): change --compiler_options, or leave out the gin file that sets "
            "them."
        ) from error


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`; an empty name keeps none.

    Of several processes JAX lets the first write: a folder in gs:// serves all of them, one on each
    host's own disk the first alone. A folder that cannot be written gives a warning, once, and
    keeps none.

    Raises:
      InputError: A URL other than gs://.
    """
    if not folder:
        return
    if is_remote(folder) and not folder.startswith("gs://"):
        raise InputError(
            f"compilation_cache is {folder}, and JAX keeps programs on a disk or in gs://: change "
            "--compilation_cache."
        )
    try:
        path = path_of(folder) if is_remote(folder) else writable(folder)
    except OSError as error:
        _warn_not_kept(folder, str(error.strerror))
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def _warn_not_kept(folder: str, reason: str) -> None:
    warn(
        f"{folder} cannot be written ({reason}): programs are compiled again in each run; "
        "set --compilation_cache to a folder that can be written, or to nothing."
    )
