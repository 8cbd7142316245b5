"""The modules `tf` and `seqio`, imported without TensorFlow's messages about its build and GPUs."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Silences stderr, to which TensorFlow's native code writes directly during import."""
    standard_error = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nowhere)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _silent_standard_error():
    import seqio
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # reading text must not claim GPU memory

__all__ = ["seqio", "tf"]
