"""Memory of `salt convert`: by the largest tensor, whatever the model's size."""

import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from salt_jax.data.safetensors_files import DTYPES, TensorInfo, write_shards
from salt_jax.models.decoder_config import DecoderConfig
from salt_jax.models.huggingface import config_to_json
from salt_jax.models.huggingface_tensors import leaf_shapes, tensor_shapes

# 493 MB in float16. A table has 52 MB, and a kernel stacked over the layers 130 MB, so that whoever
# holds that is found out.
CONFIG = DecoderConfig(
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
SHARD_BYTES = 40_000_000
MEASURE = """
import resource, sys
import jax
import salt_jax.commands.convert
from salt_jax.main import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

jax.devices()
before = peak()
assert main(["convert", *sys.argv[1:]]) == 0
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_model_is_never_held_whole(random_models: Any, tmp_path: pathlib.Path) -> None:
    source, run, out = tmp_path / "theirs", tmp_path / "run", tmp_path / "out"
    source.mkdir()
    rows = CONFIG.padded_vocab_size
    architecture, settings = config_to_json(CONFIG, rows, "float16", {"eos_token_id": 0})
    (source / "config.json").write_text(json.dumps(settings))
    random_models.save_tokenizer(source)
    shapes = tensor_shapes(CONFIG, architecture.rules(CONFIG))
    tensors = [TensorInfo(name, "float16", shape) for name, shape in shapes]
    rng = np.random.default_rng(0)  # random bits, which don't compress
    arrays = (
        rng.integers(0, 30_000, tensor.shape, np.uint16).view(DTYPES["float16"])
        for tensor in tensors
    )
    write_shards(source, tensors, arrays, 1 << 40)

    largest = max(tensor.num_bytes for tensor in tensors)
    total = sum(tensor.num_bytes for tensor in tensors)
    stacked = max(math.prod(shape) for shape in leaf_shapes(CONFIG).values()) * 2
    assert min(total, stacked + largest) > 2 * largest + SHARD_BYTES, "the bound tells nothing"
    assert grown(f"--huggingface={source}", f"--output_dir={run}") < 2 * largest
    shards = f"--max_shard_bytes={SHARD_BYTES}"
    assert grown(f"--model={run}", shards, f"--output_dir={out}") < 2 * largest + SHARD_BYTES


def grown(*flags: str) -> int:
    """Bytes by which a process of its own grows while it converts."""
    command = [sys.executable, "-c", MEASURE, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.splitlines()[-1])
