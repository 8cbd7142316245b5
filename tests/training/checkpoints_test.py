"""Checkpoints: what is kept, what is found, how they move between meshes."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest

from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from salt_jax.training.checkpoints import CheckpointConfig, find_model
from salt_jax.training.partitioning import MeshConfig

Run = Callable[..., pathlib.Path]


def steps_of(run: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir())


def test_keeps_what_is_asked_for(run_train: Run) -> None:
    kept = CheckpointConfig(save_every=1, keep_last=2, keep_steps=(1,), keep_every=3)
    assert steps_of(run_train(checkpoints=kept)) == [1, 3, 5, 6]


def test_params_load_on_another_mesh(slm: pathlib.Path) -> None:
    model = find_model(slm, 4, "teacher")
    sharded = model.load_params(MeshConfig(fsdp=4, tensor=2).make())
    single = model.load_params(MeshConfig(fsdp=1).make(jax.devices()[:1]))
    assert len(jax.tree.leaves(sharded)[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(a, b)
    half = model.load_params(MeshConfig().make(), dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


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
