"""The persistent compilation cache: what was compiled once is not compiled again."""

import pathlib

import jax

DEFAULT_FOLDER = "~/.cache/salt_jax/programs"


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` (~ is the home folder); an empty name keeps none."""
    if not folder:
        return
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
