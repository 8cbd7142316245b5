"""A verb as a process: how it ends is told apart, and a late request to stop is not lost."""

import pathlib
import signal

import pytest

from salt_jax.cli import verb_process
from salt_jax.cli.verb_process import run_verb
from salt_jax.errors import InputError, Interrupted, RunFailed


def stand_in(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Makes `python` a script of ours, which is given -P -m salt_jax VERB …"""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setattr(verb_process.sys, "executable", str(script))


@pytest.mark.parametrize(
    ("code", "error"), [(1, RunFailed), (2, InputError), (75, Interrupted), (139, RunFailed)]
)
def test_exit_codes(
    code: int, error: type[Exception], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, f"exit {code}")
    with pytest.raises(error, match="salt score"):
        run_verb("score", [], tmp_path)


def test_what_is_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, f'echo "$@" $WORD > {tmp_path}/said')
    run_verb("train", ["--steps=3"], tmp_path / "out", {"WORD": "word"})
    said = (tmp_path / "said").read_text()
    assert said == f"-P -m salt_jax train --steps=3 --output_dir={tmp_path / 'out'} word\n"


def test_a_stop_that_comes_too_late_still_stops(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process asks its parent to stop, is told to stop itself, and ends well all the same."""
    stand_in(tmp_path, monkeypatch, "trap '' TERM; kill -TERM $PPID; exit 0")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="run the same command again"):
        run_verb("train", [], tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_terminal_asks_the_child_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request of a kind would end it in the midst of saving."""
    stand_in(
        tmp_path,
        monkeypatch,
        f"trap 'echo asked >> {tmp_path}/asked' TERM; trap '' HUP\n"
        "kill -HUP $PPID; until test -f asked; do :; done\n"
        "kill -HUP $PPID; kill -HUP $PPID; exit 75",
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted, match="run the same command again"):
        run_verb("train", [], tmp_path / "out")
    assert (tmp_path / "asked").read_text() == "asked\n"
