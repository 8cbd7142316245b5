"""Memory of `salt convert`: by the largest tensor, whatever the model's size."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from salt_jax.huggingface.model_config import config_to_json
from salt_jax.huggingface.safetensors_files import DTYPES, TensorInfo, write_shards
from salt_jax.huggingface.tensors import leaf_shapes, tensor_shapes
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.training.checkpointer import Checkpointer
from salt_jax.training.checkpoints import CheckpointConfig, find_model, read_progress
from salt_jax.training.partitioning import MeshConfig
from salt_jax.training.train_state import TrainState

# 493 MB in float16. A table has 52 MB, and a kernel stacked over the layers 130 MB, so that whoever
# holds that is found out.
MODEL = DecoderConfig(
    embed_dim=512,
    num_layers=62,
    num_heads=8,
    mlp_dim=2048,
    vocab_size=300,
    vocab_multiple=50_304,
    norm="layernorm",
    use_bias=True,
    gated_mlp=False,
    tied_embeddings=False,
    scale_embeddings=False,
)
TOY = dataclasses.replace(MODEL, embed_dim=16, num_layers=1, mlp_dim=16, vocab_multiple=300)
SHARD_BYTES = 40_000_000
# What libraries take for themselves comes with the toy.
MEASURE = """
import json, pathlib, re, sys
from salt_jax.main import main

def resident(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

toy, measured = json.loads(sys.argv[1])
assert main(["convert", *toy]) == 0
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
before = resident("VmRSS")
assert main(["convert", *measured]) == 0
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_a_model_is_never_held_whole(random_models: Any, tmp_path: pathlib.Path) -> None:
    write_random(tmp_path / "toy", TOY, random_models)
    tensors = write_random(tmp_path / "model", MODEL, random_models)
    largest = max(tensor.num_bytes for tensor in tensors)
    total = sum(tensor.num_bytes for tensor in tensors)
    stacked = max(math.prod(shape) for shape in leaf_shapes(MODEL).values()) * 2
    assert min(total, stacked + largest) > 2 * largest + SHARD_BYTES, "the bound tells nothing"

    def flags(name: str) -> tuple[list[str], list[str]]:
        folder = tmp_path / name
        return (
            [f"--huggingface={folder}", f"--output_dir={folder / 'run'}"],
            [
                *(f"--model={folder / 'run'}", f"--max_shard_bytes={SHARD_BYTES}"),
                f"--output_dir={folder / 'out'}",
            ],
        )

    bounds = (2 * largest, 2 * largest + SHARD_BYTES)
    for toy, measured, bound in zip(flags("toy"), flags("model"), bounds, strict=True):
        assert grown(toy, measured) < bound
    # As the training loop saves it, in Orbax's own way.
    save_as_trained(tmp_path / "model" / "run")
    _, out = flags("model")
    again = [*out[:-1], f"--output_dir={tmp_path / 'again'}"]
    assert grown(flags("toy")[1], again) < bounds[1]


def save_as_trained(run: pathlib.Path) -> None:
    """Puts a checkpoint of a converted run in its place as a run that trained writes it."""
    mesh = MeshConfig(fsdp=1).make(jax.devices()[:1])
    params, progress = find_model(run, 0, "model").load_params(mesh), read_progress(run, 0)
    shutil.rmtree(run / "checkpoints")
    zero = jax.numpy.int32(0)
    with contextlib.closing(Checkpointer(run, CheckpointConfig())) as checkpointer:
        checkpointer.save(0, TrainState(zero, params, {"count": zero}, zero), progress)


def write_random(
    folder: pathlib.Path, config: DecoderConfig, random_models: Any
) -> list[TensorInfo]:
    """A model of random bits, which don't compress."""
    folder.mkdir()
    rows = config.padded_vocab_size
    family, settings = config_to_json(config, rows, "float16", {"eos_token_id": 0})
    (folder / "config.json").write_text(json.dumps(settings))
    random_models.save_tokenizer(folder)
    shapes = tensor_shapes(config, family.rules(config))
    tensors = [TensorInfo(name, "float16", shape) for name, shape in shapes]
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(0, 30_000, tensor.shape, np.uint16).view(DTYPES["float16"])
        for tensor in tensors
    )
    write_shards(folder, tensors, arrays, 1 << 40)
    return tensors


def grown(toy: list[str], measured: list[str]) -> int:
    """Bytes by which a process of its own grows while it converts, at the most."""
    command = [sys.executable, "-c", MEASURE, json.dumps([toy, measured])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.splitlines()[-1])
