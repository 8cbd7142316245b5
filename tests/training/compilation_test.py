"""Nothing compiles once the first step has begun, and what was compiled once is kept."""

import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.measurement import CompilationCounter
from salt_jax.distill import schedules
from salt_jax.errors import InputError
from salt_jax.storage.buckets import path_of
from salt_jax.training import compilation, loop
from salt_jax.training.checkpoints import CheckpointConfig
from salt_jax.training.config import Devices
from salt_jax.training.train_step import Programs, make_step
from tests.bucket_emulator import BucketEmulator

SALT: dict[str, Any] = {
    "schedule": schedules.Step(omega=0.6, n_kd=3),
    "steps": 8,
    "evaluate_every": 2,
    "log_every": 2,
    "checkpoints": CheckpointConfig(save_every=2, keep_last=2),
}


@pytest.fixture
def compiled_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Programs made and functions traced while the loop runs, by where: "step 3", "save"."""
    found: Counter[str] = Counter()
    counter = CompilationCounter()

    def watch(name: str, where: Callable[..., str]) -> None:
        original = getattr(loop.Loop, name)

        def watched(self: Any, *arguments: Any, **named: Any) -> Any:
            before = counter.compiled + counter.traced
            counted = found.total()
            result = original(self, *arguments, **named)
            inside = found.total() - counted  # by a part of it that is watched too
            added = counter.compiled + counter.traced - before - inside
            found[where(*arguments)] += added
            return result

        monkeypatch.setattr(loop.Loop, name, watched)

    watch("_train", lambda *_: "between")
    watch("_step", lambda step, *_: f"step {step}")
    watch("_note", lambda *_: "metrics")
    watch("_evaluate", lambda done, *_: f"evaluation {done}")
    watch("_save", lambda done, *_: f"save {done}")
    with counter:
        yield found


def test_nothing_compiles_once_the_first_step_has_begun(
    run_train: Callable[..., pathlib.Path], slm: pathlib.Path, compiled_in: Counter[str]
) -> None:
    """Through the switch, evaluations, saves and lines of metrics."""
    jax.clear_caches()  # of what other tests have made, little operations among it
    run_train(teacher=str(slm), **SALT)
    assert {"step 0", "step 3", "evaluation 2", "save 2", "metrics", "between"} <= set(compiled_in)
    assert +compiled_in == Counter()


def test_a_program_that_is_not_ready_is_noticed_at_the_switch(
    run_train: Callable[..., pathlib.Path],
    slm: pathlib.Path,
    compiled_in: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: here the plain program is compiled when it is first called."""
    compile_programs = loop.compile_programs

    def half_ready(layout: Any, loss: Any, *arguments: Any, **settings: Any) -> Programs:
        programs = compile_programs(layout, loss, *arguments, **settings)
        lazy = jax.jit(make_step(layout, loss, 1), out_shardings=(layout.shardings, None))
        return Programs(lazy, programs.distill)

    monkeypatch.setattr(loop, "compile_programs", half_ready)
    run_train(teacher=str(slm), **SALT)
    assert set(+compiled_in) == {"step 3"}


def test_the_counter_counts_while_it_is_entered() -> None:
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    x_3 = jnp.ones(3)
    with CompilationCounter() as counter:
        jax.jit(double)(x_3)
    counted = (counter.traced, counter.compiled)
    assert min(counted) > 0
    assert counter.seconds > 0
    jax.jit(lambda x: 3 * x)(x_3)
    assert (counter.traced, counter.compiled) == counted


def test_the_persistent_cache_is_on_by_default() -> None:
    assert Devices().compilation_cache == compilation.DEFAULT_FOLDER != ""


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_what_was_compiled_is_found_again(
    tmp_path: pathlib.Path, where: str, bucket: BucketEmulator
) -> None:
    folder = "gs://bucket/programs" if where == "bucket" else str(tmp_path / "programs")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    hits: list[str] = []

    def note(event: str, **attributes: Any) -> None:
        del attributes
        hits.extend([event] * event.endswith("/cache_hits"))

    def compile_it() -> int:
        """How many programs the persistent cache gave."""
        jax.clear_caches()
        hits.clear()
        jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((5, 5))).compile()
        return len(hits)

    jax.monitoring.register_event_listener(note)
    compilation_cache.reset_cache()
    try:
        compilation.use_compilation_cache(folder)
        # A program this small is not worth keeping otherwise.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        assert compile_it() == 0
        assert list(path_of(folder).iterdir())
        assert compile_it() > 0
        compilation.use_compilation_cache("")
        assert jax.config.jax_compilation_cache_dir == folder
    finally:
        jax.monitoring.unregister_event_listener(note)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_bucket_that_jax_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="change --compilation_cache"):
        compilation.use_compilation_cache("s3://bucket/programs")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_done_without(
    tmp_path: pathlib.Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    for _ in range(2):
        compilation.use_compilation_cache(str(tmp_path / name))
    assert jax.config.jax_compilation_cache_dir == before
    error = capsys.readouterr().err
    assert error.startswith(f"salt: {tmp_path / name} cannot be written (")
    assert error.count("\n") == 1


def test_a_folder_of_another_s_is_done_without(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # of root, who may all, neither
    before = jax.config.jax_compilation_cache_dir
    compilation.use_compilation_cache(str(tmp_path / "programs"))
    assert jax.config.jax_compilation_cache_dir == before
    assert "cannot be written (Permission denied)" in capsys.readouterr().err
