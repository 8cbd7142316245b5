"""Several real processes that run one command: trained together, stopped, moved, killed."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np
import pytest

from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores
from salt_jax.training.checkpoints import complete_steps, find_model
from salt_jax.training.partitioning import MeshConfig
from tests.bucket_emulator import BucketEmulator

pytestmark = pytest.mark.slow

STEPS = 12
ENDING_SECONDS = 300
SURVIVORS_SECONDS = 60  # the promise: nobody waits longer than this for a process that is gone


_started: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    """A test that failed leaves processes that wait for each other."""
    yield
    while _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(_started.pop().pid, signal.SIGKILL)


class Together:
    """`salt ARGUMENTS` in `count` processes of `devices` devices each; one of them may be STUCK.

    Process 1 may have `more` devices, and flags of its own.
    """

    def __init__(
        self,
        count: int,
        devices: int,
        arguments: Sequence[str],
        stuck: int | None = None,
        more: int = 0,
        own: Sequence[str] = (),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        several = [f"--coordinator_address=127.0.0.1:{port}", f"--process_count={count}"]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
        }
        self.members = [
            subprocess.Popen(
                [
                    *(sys.executable, *(("-c", STUCK) if index == stuck else ("-m", "salt_jax"))),
                    *arguments,
                    *(own if index == 1 else ()),
                    *(several if count > 1 else []),
                    *([f"--process_index={index}"] if count > 1 else []),
                ],
                env=environment | {"JAX_NUM_CPU_DEVICES": str(devices + more * (index == 1))},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for index in range(count)
        ]
        _started.extend(self.members)

    def end(self, timeout: float = ENDING_SECONDS) -> list[tuple[int, str]]:
        """Exit code and text of each. The test fails, with the texts, if one does not end."""
        try:
            texts = [member.communicate(timeout=timeout)[0] for member in self.members]
        except subprocess.TimeoutExpired:
            self.fail(f"not ended after {timeout:g} s")
        return [(member.returncode, text) for member, text in zip(self.members, texts, strict=True)]

    def fail(self, reason: str) -> NoReturn:
        """Kills all, and fails the test with what they said."""
        for index in range(len(self.members)):
            with contextlib.suppress(ProcessLookupError):
                self.kill(index)
        texts = [member.communicate()[0] for member in self.members]
        pytest.fail("\n\n".join([reason, *texts]))

    def kill(self, index: int) -> None:
        """SIGKILL to a process and what it has started."""
        os.killpg(self.members[index].pid, signal.SIGKILL)


def run(count: int, devices: int, arguments: Sequence[str]) -> list[str]:
    ended = Together(count, devices, arguments).end()
    assert [code for code, _ in ended] == [0] * count, ended
    return [text for _, text in ended]


def training(
    cache: PackedCache, slm: pathlib.Path, output: pathlib.Path, steps: int = STEPS
) -> list[str]:
    return [
        *("train", "--gin_file=runs/pretrain.gin", "--gin_file=methods/salt.gin"),
        *("--gin_file=hardware/fsdp.gin", f"--cache={cache.path}", f"--teacher={slm}"),
        *(f"--gin.N_KD={steps // 2}", f"--steps={steps}", "--batch_size=8", "--log_every=1"),
        *("--gin.LEARNING_RATE=3e-3", "--gin.WARMUP_STEPS=2", "--gin.SAVE_EVERY=3"),
        *("--gin.decoder.DecoderConfig.mlp_dim=64", "--gin.decoder.DecoderConfig.embed_dim=32"),
        *("--gin.decoder.DecoderConfig.num_layers=2", "--gin.decoder.DecoderConfig.num_heads=2"),
        *(f"--compilation_cache={slm / 'programs'}", f"--output_dir={output}"),
    ]


# `salt ARGUMENTS` whose third step's rows never come; pulses go on.
STUCK = """
import os, sys, threading
from salt_jax.data.input_pipeline import InputPipeline
from salt_jax.main import main
from salt_jax.runtime.processes import GUARDED

read = InputPipeline.batch
InputPipeline.batch = lambda self, step: threading.Event().wait() if step == 3 else read(self, step)
os.environ[GUARDED] = ""
sys.exit(main())
"""


def wait_for_step(together: Together, output: pathlib.Path, step: int) -> None:
    metrics = output / "metrics.jsonl"
    while all(member.poll() is None for member in together.members):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
    pytest.fail(f"the run ended before step {step}: {together.end()}")


def params_of(output: pathlib.Path) -> list[np.ndarray]:
    model = find_model(output, STEPS, "model")
    mesh = MeshConfig(fsdp=1).make(jax.devices()[:1])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.load_params(mesh))]


@pytest.fixture(scope="module")
def alone(
    cache: PackedCache, slm: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A run of one process with four devices."""
    output = tmp_path_factory.mktemp("alone")
    run(1, 4, training(cache, slm, output))
    return output


def test_one_two_and_four_processes_train_the_same_model(
    cache: PackedCache, slm: pathlib.Path, alone: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two processes, each a slice, are asked to stop, by way of one of them; four go on from their
    checkpoint, and save by the clock."""
    output = tmp_path / "run"
    slices = ["--gin.partitioning.MeshConfig.slice=2", "--microbatches=2"]
    together = Together(2, 2, [*training(cache, slm, output), *slices])
    wait_for_step(together, output, 2)
    together.members[1].terminate()
    ended = together.end()
    assert [code for code, _ in ended] == [75, 75], ended
    (stopped,) = {complete_steps(output)[-1]}
    assert 2 <= stopped < STEPS
    for _, text in ended:
        assert f"stopped by SIGTERM after step {stopped} of {STEPS}" in text
    saves = ["--checkpoints.save_minutes=1e-9", "--checkpoints.keep_last=99", "--gin.SAVE_EVERY=0"]
    first, second, *_ = run(4, 1, [*training(cache, slm, output), *saves])
    # Process 0 asks for a save after the last one, and all save after the second step from then.
    assert complete_steps(output)[1:] == [*range(stopped + 3, STEPS, 3), STEPS]
    assert f"continues at step {stopped}" in first
    assert "continues at step" not in second, "one process speaks for all"
    for ours, theirs in zip(params_of(output), params_of(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (output, alone))
    assert ours["rows_consumed"] == theirs["rows_consumed"]
    assert ours["log_perplexity"] == pytest.approx(theirs["log_perplexity"], abs=1e-4)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert sorted({*steps}) == list(range(1, STEPS + 1))
    assert len(steps) <= STEPS + 1, "each step is told of by one process"


def test_a_terminal_that_is_closed_stops_all(
    cache: PackedCache, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its end reaches what watches a process and the process itself."""
    together = Together(2, 1, training(cache, slm, tmp_path, steps=100_000))
    wait_for_step(together, tmp_path, 2)
    os.killpg(together.members[1].pid, signal.SIGHUP)
    ended = together.end(timeout=SURVIVORS_SECONDS)
    assert [code for code, _ in ended] == [75, 75], ended
    stopped = complete_steps(tmp_path)[-1]
    for _, text in ended:
        assert f"after step {stopped} of 100000, which is saved" in text


@pytest.mark.parametrize(("victim", "survivor"), [(1, 0), (0, 1)])
def test_who_goes_missing_is_named(
    victim: int, survivor: int, cache: PackedCache, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "run"
    together = Together(2, 1, training(cache, slm, output, steps=100_000))
    wait_for_step(together, output, 2)
    together.kill(victim)
    text, _ = together.members[survivor].communicate(timeout=SURVIVORS_SECONDS)
    assert together.members[survivor].returncode == 75, text
    sentence = next(line for line in text.splitlines() if line.startswith("salt: "))
    assert f"process {victim}" in sentence
    assert f"on {socket.gethostname()}" in sentence
    assert "missing" in sentence


def test_two_processes_score_and_evaluate_as_one(
    cache: PackedCache, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = ["score", f"--scorer={slm}", f"--cache={cache.path}", "--shard_rows=16"]
    flags += ["--compilation_cache="]
    one, two = tmp_path / "one", tmp_path / "two"
    run(1, 1, [*flags, f"--output_dir={one}"])
    run(2, 1, [*flags, f"--output_dir={two}"])
    ours, theirs = (RowScores.open(folder, cache_digest=cache.digest) for folder in (two, one))
    assert ours.manifest["columns"] == theirs.manifest["columns"]
    for name, _ in theirs.manifest["columns"]:
        everything = slice(0, theirs.rows)
        np.testing.assert_array_equal(
            ours.column(name)[everything], theirs.column(name)[everything]
        )
    flags = ["evaluate", f"--model={slm}", f"--cache={cache.path}", "--compilation_cache="]
    results = []
    for count, devices, output in ((1, 4, tmp_path / "a"), (2, 2, tmp_path / "b")):
        run(count, devices, [*flags, "--batch_size=8", f"--output_dir={output}"])
        results.append(json.loads((output / "summary.json").read_text()))
    assert results[0]["by_subset"].keys() == results[1]["by_subset"].keys()
    for name in ("log_perplexity", "next_token_accuracy", "evaluated_tokens"):
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "own", "expected"),
    [
        (1, (), "Process 0 has 1 devices and process 1 has 2: give each process as many"),
        (0, ("--seed=5",), "Process 1 of 2 has other settings than process 0: give all of them"),
    ],
)
def test_processes_that_are_not_alike_all_say_so(
    more: int, own: Sequence[str], expected: str, cache: PackedCache, tmp_path: pathlib.Path
) -> None:
    """Before they do anything together, whatever the verb."""
    output = tmp_path / "out"
    flags = ["evaluate", "--model=none", f"--cache={cache.path}", f"--output_dir={output}"]
    for code, text in Together(2, 1, flags, more=more, own=own).end():
        assert code == 2, text
        assert f"salt: {expected}" in text
        assert "Traceback" not in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--process_count=2"], "only process_count is set: add --coordinator_address=VALUE"),
        (["--multi_process=maybe"], "multi_process is 'maybe': set it to True or False"),
        (["--coordinator_address=h:1", "--process_count=2", "--process_index=2"], "is 2 of 2"),
        (["--coordinator_address=h:1", "--process_count=0", "--process_index=0"], "from 1 on"),
        (["--coordinator_address=h", "--process_count=2", "--process_index=0"], "a port"),
    ],
)
def test_bad_flags(
    flags: list[str],
    expected: str,
    cache: PackedCache,
    slm: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from salt_jax.main import main

    monkeypatch.setenv("SALT_GUARDED", "")
    output = tmp_path / "run"
    assert main([*training(cache, slm, output), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert not output.exists()


def test_a_collective_that_hangs_is_told_of_with_stacks_and_names_what_hangs(
    cache: PackedCache, slm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One process's rows never come, so the other waits for it on the devices."""
    arguments = [*training(cache, slm, tmp_path / "run"), "--hang_seconds=20"]
    together = Together(2, 2, arguments, stuck=1)
    awaited = ("the (devices at|program of) step [45]", "the input pipeline at step 4")
    told = [
        said_after_waiting(member, what)
        for member, what in zip(together.members, awaited, strict=True)
    ]
    for index in (0, 1):
        together.kill(index)
    together.end()
    assert all("loop.py" in text for text in told), told


def said_after_waiting(member: "subprocess.Popen[str]", what: str) -> str:
    """The report of a wait, not of one before it (compiling may be slow too), with its stacks to
    their end: the main thread's is the last."""
    assert member.stdout is not None
    report = ""
    for line in member.stdout:
        if re.search(f"HAS WAITED .* FOR {what}, and waits on", line) or report:
            report += line
        if report and "in _run\n" in line and "main.py" in line:
            return report
    pytest.fail(f"the process ended without saying that it waits for {what}")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
def test_in_a_bucket_each_of_three_is_killed_and_others_go_on(
    cache: PackedCache,
    slm: pathlib.Path,
    bucket: BucketEmulator,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a shared disk. Six devices in three processes, then two, three, and three again."""
    monkeypatch.setenv("SALT_MISSING_SECONDS", "8")
    alone = tmp_path / "alone"
    run(3, 2, [*training(cache, slm, alone), "--batch_size=12"])
    typed = [*training(cache, slm, pathlib.Path("-")), "--batch_size=12"]
    typed = [*typed[:-2], "--output_dir=gs://bucket/runs/a", typed[-1]]
    bucket.take(slm, "bucket/slm")
    typed[typed.index(f"--teacher={slm}")] = "--teacher=gs://bucket/slm"
    typed += ["--teacher.step=12", "--hang_seconds=90"]
    for victim, (count, devices), step in [(2, (3, 2), 3), (1, (2, 3), 6), (0, (3, 2), 9)]:
        together = Together(count, devices, typed)
        if not bucket.wait_for(f"bucket/runs/a/checkpoints/{step}/commit_success.txt"):
            together.fail(f"step {step} was not saved")
        together.kill(victim)
        ended = together.end(timeout=SURVIVORS_SECONDS)
        assert {code for code, _ in ended} <= {75, -signal.SIGKILL}, ended
    first, *_ = run(3, 2, typed)
    assert "continues at step" in first
    for name in bucket.names("bucket/runs/a"):
        (tmp_path / "taken" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "taken" / name).write_bytes(bucket.objects[f"bucket/runs/a/{name}"])
    for ours, theirs in zip(params_of(tmp_path / "taken"), params_of(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    lines = bucket.objects["bucket/runs/a/metrics.jsonl"].decode().splitlines()
    steps = {json.loads(line)["step"] for line in lines if '"train"' in line}
    assert steps == {*range(1, STEPS + 1)}


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
@pytest.mark.parametrize("refused", [0, 1])
def test_a_checkpoint_that_the_bucket_refuses_to_one_ends_all(
    refused: int, cache: PackedCache, slm: pathlib.Path, bucket: BucketEmulator
) -> None:
    """At once, though the others wait for its part of the checkpoint."""

    class _Refused(set[str]):
        def __contains__(self, name: object) -> bool:
            return f"checkpoints/6/params/ocdbt.process_{refused}/" in str(name)

    bucket.failing_names = _Refused()
    typed = training(cache, slm, pathlib.Path("-"))
    typed = [*typed[:-1], "--output_dir=gs://bucket/runs/a"]
    ended = Together(2, 1, typed).end(timeout=SURVIVORS_SECONDS)
    codes = [1, 75] if refused == 0 else [75, 1]
    assert [code for code, _ in ended] == codes, ended
    said = "The checkpoint of step 6 could not be written: gs://bucket/runs/a"
    assert f"salt: {said}" in ended[refused][1]
    assert f"salt: process {refused} of 2" in ended[1 - refused][1]
    assert said in ended[1 - refused][1]
    assert bucket.names("bucket/runs/a/checkpoints/3") >= {"commit_success.txt"}
    assert "commit_success.txt" not in bucket.names("bucket/runs/a/checkpoints/6")
