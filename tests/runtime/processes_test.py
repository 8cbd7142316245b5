"""The pulse: who is missing is named, on a full disk too, and nobody else is."""

import contextlib
import hashlib
import json
import pathlib
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from salt_jax.errors import InputError
from salt_jax.runtime import processes
from salt_jax.runtime.processes import Processes, Pulse
from salt_jax.storage.durable_files import write_text

Beats = Callable[..., list[str]]


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Beats:
    """So many beats of pulses in turn, two seconds apart by a clock of their own."""
    now = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])

    def beat(count: int, *pulses: Pulse) -> list[str]:
        lost = []
        for _ in range(count):
            now[0] += 2.0
            lost += [pulse.beat() for pulse in pulses]
        return lost

    return beat


def state(folder: pathlib.Path, index: int) -> dict[str, object]:
    return dict(json.loads((folder / "processes" / f"{index}.json").read_text()))


def test_who_stands_still_is_missing(tmp_path: pathlib.Path, beats: Beats) -> None:
    first, second, third = (Pulse(tmp_path, Processes(index, 3)) for index in range(3))
    assert not any(beats(20, first, second, third))
    lost = beats(20, first, third)
    assert lost[0] == ""
    assert "process 1 of 3 on " in lost[-2]
    assert "gone missing" in lost[-2]
    assert lost[-1] == "", "the others hear of it from the first"
    assert "process 0 of 3" in beats(20, third)[-1], "which they watch"


def test_a_full_disk_stops_no_pulse(small_disk: pathlib.Path, beats: Beats) -> None:
    first, second = (Pulse(small_disk, Processes(index, 2)) for index in (0, 1))
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match="No space left"):
        write_text(small_disk / "processes" / "any.json", "{}")
    assert not any(beats(20, first, second))
    assert state(small_disk, 0)["beat"] == 20
    second.stop("É" * 10_000)
    assert "ended (ÉÉ" in first.beat()


def test_who_cannot_write_holds_nobody_for_missing(
    tmp_path: pathlib.Path, beats: Beats, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (Pulse(tmp_path, Processes(index, 2)) for index in (0, 1))
    assert not any(beats(20, first, second))
    own = tmp_path / "processes" / "0.json"
    own.unlink()
    own.mkdir()
    assert not any(beats(20, first)), "the other one is silent, and may be able to write no more"
    assert capsys.readouterr().err.count("the pulse could not be written") == 1
    own.rmdir()
    lost = beats(20, first)
    assert lost[0] == "", "the other one has its time from here on"
    assert "process 1 of 2" in lost[-1]
    second.stop("ValueError")
    own.unlink()
    own.mkdir()
    assert "ended (ValueError)" in first.beat(), "who has ended said so"


def test_what_is_read_in_part_is_neither_a_beat_nor_an_end(
    tmp_path: pathlib.Path, beats: Beats
) -> None:
    """A reader may see the beginning of one content and the rest of the other."""
    first, second = (Pulse(tmp_path, Processes(index, 2)) for index in (0, 1))
    path = tmp_path / "processes" / "1.json"
    for _ in range(99):
        second.beat()
    contents = [path.read_bytes()]
    second.beat()
    contents.append(path.read_bytes())
    second.stop("it said }, and {")
    contents.append(path.read_bytes())
    second.beat()
    assert path.read_bytes() == contents[-1], "after an end nothing changes"
    assert len({len(content) for content in contents}) == 1
    torn = 0
    for old, new in ((contents[0], contents[1]), (contents[1], contents[2])):
        for before, after in ((old, new), (new, old)):
            for cut in range(len(new.rstrip()) + 2):
                path.write_bytes(before[:cut] + after[cut:])
                found = processes._read(path)
                torn += not found
                assert found.get("ended", "it said }, and {") == "it said }, and {"
    assert torn > 20, "contents that are no JSON were among them"
    lost = []
    for content in (contents[0], b'{"host": "a', contents[0], b'{"host": "a'):
        path.write_bytes(content)
        lost.append(beats(8, first))  # a file that comes and goes is no life
    assert not any(lost[0])
    assert f"on {state(tmp_path, 0)['host']}" in lost[-1][-1]
    assert "gone missing" in lost[-1][-1]


def test_uneven_devices_are_refused_where_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: None)
    of_process = [0, 1, 1, 2]
    devices = [types.SimpleNamespace(process_index=index) for index in of_process]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(InputError, match="Process 0 has 1 devices and process 1 has 2: show each"):
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
