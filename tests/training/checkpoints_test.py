"""Checkpoints: what is kept, what is found, how they move between meshes."""

import dataclasses
import pathlib
import secrets
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import atomicity

from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError, RunFailed
from salt_jax.models import decoder
from salt_jax.training.checkpoint_digests import write_digests
from salt_jax.training.checkpoints import CheckpointConfig, complete_steps, find_model
from salt_jax.training.partitioning import MeshConfig

Run = Callable[..., pathlib.Path]


def steps_of(run: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir())


def test_keeps_what_is_asked_for(run_train: Run) -> None:
    kept = CheckpointConfig(save_every=1, keep_last=2, keep_steps=(1,), keep_every=3)
    found = steps_of(run_train(checkpoints=kept))
    # One that is not to be kept may be left out while another is being written.
    assert {1, 3, 6} <= {*found} <= {1, 3, 4, 5, 6}
    assert len(found) <= 4


def test_the_newest_is_what_the_first_process_found(
    slm: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_model(slm, None, "teacher").step == 12
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: np.int32(4))
    assert find_model(slm, None, "teacher").step == 4


def test_params_load_on_another_mesh(slm: pathlib.Path) -> None:
    model = find_model(slm, 4, "teacher")
    sharded = model.load_params(MeshConfig(fsdp=4, tensor=2).make())
    single = model.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1]))
    assert len(jax.tree.leaves(sharded)[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(a, b)


def test_params_held_in_the_dtype_of_computation_compute_the_same(slm: pathlib.Path) -> None:
    model = find_model(slm, None, "teacher")
    config = dataclasses.replace(model.config, dtype="bfloat16")
    mesh = MeshConfig(fsdp=1).make(jax.devices()[:1])
    batch = {
        "inputs": jnp.arange(48).reshape(3, 16),
        "segment_ids": jnp.ones((3, 16), jnp.int32),
        "positions": jnp.tile(jnp.arange(16), (3, 1)),
    }
    whole, half = model.load_params(mesh), model.load_params(mesh, dtype="bfloat16")
    scale_D = whole["final_norm"]["scale"]
    assert not np.array_equal(scale_D, scale_D.astype(jnp.bfloat16)), "the test would not see it"
    assert half["embedding"].dtype == jnp.bfloat16

    def logits(params: Any) -> np.ndarray:
        hidden = decoder.hidden_states(config, params, batch)
        return np.asarray(decoder.logits(hidden, decoder.head_kernel(params, config), config))

    np.testing.assert_array_equal(logits(whole), logits(half))


def test_digest_names_the_parameters(slm: pathlib.Path) -> None:
    early, late = find_model(slm, 4, "teacher"), find_model(slm, None, "teacher")
    assert (early.step, late.step) == (4, 12)
    assert early.digest != late.digest
    assert early.digest == find_model(slm, 4, "scorer").digest


def test_a_run_keeps_its_vocabulary(slm: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = find_model(slm, 4, "model")
    vocabulary = model.load_vocabulary()
    assert vocabulary.fingerprint == model.vocabulary_fingerprint
    moved = dataclasses.replace(model, path=tmp_path)
    with pytest.raises(InputError, match=r"has no vocabulary/: copy that folder"):
        moved.load_vocabulary()
    ByteVocabulary(reserved=5).save(tmp_path / "vocabulary")
    with pytest.raises(InputError, match=r"has the fingerprint .* was trained with"):
        moved.load_vocabulary()


def test_refuses_what_is_not_there(slm: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"teacher is .*no checkpoints"):
        find_model(tmp_path, None, "teacher")
    with pytest.raises(InputError, match=r"step 5 of .*, which has 4, 12"):
        find_model(slm, 5, "scorer")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        find_model(tmp_path, None, "teacher")


@pytest.mark.parametrize("bad", [{"save_every": -1}, {"keep_last": 0}, {"keep_every": -2}])
def test_refuses_bad_settings(bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match="CheckpointConfig got"):
        CheckpointConfig(**bad)


def test_a_flipped_byte_is_found_in_every_file(run_train: Run, tmp_path: pathlib.Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # which a failure shows
    run, rng = run_train(), np.random.default_rng(seed)
    step = run / "checkpoints" / "4"
    files = [
        path.relative_to(run)
        for item in ("params", "progress")
        for path in (step / item).rglob("*")
        if path.is_file() and path.stat().st_size and path.name != "commit_success.txt"
    ]
    assert len(files) > 5
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in files:
        data = bytearray((run / file).read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        (copy / file).write_bytes(data)
        with pytest.raises(InputError, match=r"is damaged \(.* is not what was written\)") as error:
            find_model(copy, 4, "teacher")
        assert str(file.relative_to("checkpoints/4")) in str(error.value)
        assert "use another one (2, 6)" in str(error.value)
        (copy / file).unlink()
        with pytest.raises(InputError, match=r"is damaged \(.* is missing\)"):
            find_model(copy, 4, "teacher")
        shutil.copy(run / file, copy / file)
    assert find_model(copy, 4, "teacher").digest == find_model(run, 4, "teacher").digest


def test_without_digests_a_checkpoint_is_loaded_and_said_to_be_unchecked(
    run_train: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_train(), copy)
    find_model(copy, 4, "teacher")
    assert "not checked" not in capsys.readouterr().err
    for step in (4, 6):
        (copy / "checkpoints" / str(step) / "digests.json").unlink()
    assert find_model(copy, 4, "teacher").step == 4
    find_model(copy, 4, "scorer")
    (sentence,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("salt: ")]
    assert f"{copy / 'checkpoints' / '4'} has no digests.json" in sentence
    assert "its files are not checked" in sentence
    run_train(copy, steps=6)
    assert f"{copy / 'checkpoints' / '6'} has no digests.json" in capsys.readouterr().err


def test_a_run_goes_on_from_an_older_checkpoint_only_when_asked(
    run_train: Run, tmp_path: pathlib.Path
) -> None:
    whole = run_train()
    shutil.copytree(whole, tmp_path / "copy")
    newest = tmp_path / "copy" / "checkpoints" / "6"
    shutil.rmtree(newest)
    # As a run that was killed when half of a checkpoint was on the disk leaves it.
    shutil.copytree(newest.with_name("4"), newest.with_name("6.orbax-checkpoint-tmp"))
    (newest.with_name("4") / "optimizer" / "_METADATA").write_text("{}")
    with pytest.raises(InputError, match=r"checkpoints/4 is damaged \(optimizer/_METADATA"):
        run_train(tmp_path / "copy")
    shutil.rmtree(newest.with_name("4"))
    run_train(tmp_path / "copy")
    assert steps_of(tmp_path / "copy") == [2, 4, 6]
    again, before = find_model(tmp_path / "copy", 6, "model"), find_model(whole, 6, "model")
    mesh = MeshConfig().make()
    for a, b in zip(
        jax.tree.leaves(again.load_params(mesh)),
        jax.tree.leaves(before.load_params(mesh)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("again_by_file", [True, False])
def test_a_checkpoint_committed_by_file(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, again_by_file: bool
) -> None:
    """No folder is renamed; what a kill left without a mark is no checkpoint, unless sealed."""
    run, by_file = tmp_path / "run", CheckpointConfig(2, keep_every=2, commit_by_file=True)
    with monkeypatch.context() as patched:
        patched.setattr(atomicity.async_path, "rename", None)
        run_train(run, checkpoints=by_file)
    newest, mark = run / "checkpoints" / "6", "commit_success.txt"
    mesh = MeshConfig().make()
    before = find_model(run, 6, "model").load_params(mesh)
    begun = '{"item_handlers": {}, "commit_timestamp_nsecs": null}'
    for step, metadata in {6: begun, 4: begun[:20], 2: ""}.items():
        checkpoint = newest.with_name(str(step))
        (checkpoint / mark).unlink()
        (checkpoint / "digests.json").unlink()
        if metadata:  # otherwise as an older version wrote it
            (checkpoint / "_CHECKPOINT_METADATA").write_text(metadata)
    newest.with_name("8").mkdir()
    assert complete_steps(run) == [2]
    run_train(run, checkpoints=dataclasses.replace(by_file, commit_by_file=again_by_file))
    assert steps_of(run) == complete_steps(run) == [2, 4, 6]
    jax.tree.map(
        np.testing.assert_array_equal, find_model(run, 6, "model").load_params(mesh), before
    )
    (newest / mark).unlink()
    run_train(run, checkpoints=by_file)
    assert steps_of(run) == complete_steps(run) == [2, 4, 6]
    assert (newest / mark).exists()


PATTERNS = "lr[0.003]/run*?"


def test_a_path_is_no_pattern(run_train: Run, tmp_path: pathlib.Path) -> None:
    """Orbax looked for what to put together by a glob of the whole path."""
    straight, run = run_train(), tmp_path / PATTERNS
    # As patterns the path's names would be these, a run of other parameters.
    run_train(tmp_path / "lr0" / "run_1", seed=7)
    run_train(run)
    shutil.rmtree(run / "checkpoints" / "6")
    run_train(run)
    assert steps_of(run) == [2, 4, 6]
    mesh = MeshConfig().make()
    for item in ("params", "optimizer"):
        assert (run / "checkpoints" / "6" / item / "manifest.ocdbt").exists()
    for a, b in zip(
        jax.tree.leaves(find_model(run, 6, "model").load_params(mesh)),
        jax.tree.leaves(find_model(straight, 6, "model").load_params(mesh)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["a**b", "a\\b"])
def test_a_path_that_libraries_take_for_another_is_refused(
    slm: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    shutil.copytree(slm, tmp_path / name)
    with pytest.raises(InputError, match=r"in its path, .*: choose a folder without it"):
        find_model(tmp_path / name, None, "model")


def test_what_cannot_be_read_back_is_no_checkpoint(
    run_train: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run_train(run, steps=2)
    put_together = ocp.StandardCheckpointHandler.finalize

    def finalize(self: ocp.StandardCheckpointHandler, folder: pathlib.Path) -> None:
        put_together(self, folder)
        if folder.name.startswith("optimizer"):
            (folder / "manifest.ocdbt").unlink()

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize)
    with pytest.raises(RunFailed, match=r"cannot be read back .*manifest.ocdbt is missing"):
        run_train(run, checkpoints=CheckpointConfig(save_every=2, keep_last=1))
    monkeypatch.undo()
    # The older one is still there, and the run goes on from it.
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]
    run_train(run)
    assert steps_of(run)[-1] == 6


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_what_lacks_its_manifest_is_refused_without_digests_too(
    run_train: Run, tmp_path: pathlib.Path, item: str
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(run_train(), run)
    newest = run / "checkpoints" / "6"
    (newest / "digests.json").unlink()
    (newest / item / "manifest.ocdbt").unlink()
    missing = rf"checkpoints/6 is damaged \({item}/manifest.ocdbt is missing\)"
    with pytest.raises(InputError, match=rf"{missing}.* use another one \(2, 4\)"):
        run_train(run)
    with pytest.raises(InputError, match=missing):
        write_digests(newest, (item,))
    shutil.rmtree(newest / item)
    with pytest.raises(InputError, match=rf"checkpoints/6 is damaged \({item} is missing\)"):
        run_train(run)


def test_the_newest_checkpoint_is_the_first_process_s(
    slm: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that process lists none yet, all refuse the model."""
    broadcast = "salt_jax.training.checkpoints.multihost_utils.broadcast_one_to_all"
    monkeypatch.setattr(broadcast, lambda step: step - step - 1)
    with pytest.raises(InputError, match="has no complete checkpoint yet"):
        find_model(slm, None, "teacher")
