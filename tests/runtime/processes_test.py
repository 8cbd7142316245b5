"""Processes that meet: those that are not alike are refused."""

import hashlib
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from salt_jax.errors import InputError
from salt_jax.runtime import processes
from salt_jax.runtime.processes import Processes


def test_uneven_devices_are_refused_where_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: None)
    of_process = [0, 1, 1, 2]
    devices = [types.SimpleNamespace(process_index=index) for index in of_process]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(InputError, match="Process 0 has 1 devices and process 1 has 2: give each"):
        processes.join({"multi_process": "True"})
    del devices[1]
    assert processes.join({"multi_process": "True"}).count == jax.process_count()


def test_other_settings_are_refused_by_process(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("a", "a", "b")

    def gathered(ours: np.ndarray) -> np.ndarray:
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return np.array([[ours[0], [*digest]] for digest in digests])

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    with pytest.raises(InputError, match="Process 2 of 3 has other settings than process 0: give"):
        Processes(1, 3).require_same(versions="v", settings="a")
    texts = ("a", "a", "a")
    Processes(1, 3).require_same(versions="v", settings="a")
    Processes().require_same(settings="alone")
