"""From text to a packed cache. The only part, with tasks/, that imports TensorFlow and SeqIO."""

import importlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _import_quietly(module: str) -> None:
    """Imports without standard error, where TensorFlow announces its build and missing GPUs.

    Its native code writes there directly and heeds no log level before it is imported.
    """
    standard_error = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        importlib.import_module(module)
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nowhere)


_import_quietly("tensorflow")
