"""Import and export by `salt convert`: memory over the largest tensor, and seconds.

    python benchmarks/convert.py                                    # the shape of Pythia 1.4B
    python benchmarks/convert.py --layers 6 --width 512 --heads 8   # of Pythia 70M

Converts random float16 weights with the files and tensors of the published models; the default
needs 9 GB of disk until the end. Each conversion runs in its own process, which first converts a
toy model; memory is the rise of its resident memory after that. Linux only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import measurement
import numpy as np
import tokenizers

from salt_jax.huggingface.model_config import config_to_json
from salt_jax.huggingface.safetensors_files import DTYPES, TensorInfo, write_shards
from salt_jax.huggingface.tensors import tensor_shapes
from salt_jax.models.decoder_config import DecoderConfig

ROWS = 50_304
CONVERT = """
import json, pathlib, re, sys, time
from salt_jax.main import main

def resident(field):
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

warm_up, measured = json.loads(sys.argv[1])
assert main(["convert", *warm_up]) == 0
pathlib.Path("/proc/self/clear_refs").write_bytes(b"5")  # the most so far is forgotten
before, start = resident("VmRSS"), time.perf_counter()
assert main(["convert", *measured]) == 0
seconds = time.perf_counter() - start
print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": seconds}))
"""


def write_model(folder: pathlib.Path, layers: int, width: int, heads: int) -> list[TensorInfo]:
    """A GPT-NeoX of random weights with a tokenizer of one token."""
    config = DecoderConfig(
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        mlp_dim=4 * width,
        vocab_size=1,
        vocab_multiple=ROWS,
        norm="layernorm",
        use_bias=True,
        gated_mlp=False,
        parallel_residual=True,
        rope_fraction=0.25,
        tied_embeddings=False,
        scale_embeddings=False,
    )
    family, settings = config_to_json(config, ROWS, "float16", {"eos_token_id": 0})
    shapes = tensor_shapes(config, family.rules(config))
    tensors = [TensorInfo(name, "float16", shape) for name, shape in shapes]
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(0, 30_000, tensor.shape, np.uint16).view(DTYPES["float16"])
        for tensor in tensors
    )
    folder.mkdir()
    write_shards(folder, tensors, arrays, 5_000_000_000)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0}, [])).save(
        str(folder / "tokenizer.json")
    )
    return tensors


def converted(warm_up: list[str], measured: list[str]) -> dict[str, float]:
    """Bytes and seconds of the second of a process's two conversions."""
    command = [sys.executable, "-c", CONVERT, json.dumps([warm_up, measured])]
    result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(folder: pathlib.Path, shard_bytes: int, **sizes: int) -> dict[str, Any]:
    """Bytes and seconds in both directions."""
    toy, model = folder / "toy", folder / "model"
    write_model(toy, layers=1, width=8, heads=1)
    tensors = write_model(model, **sizes)
    largest = max(tensor.num_bytes for tensor in tensors)

    def import_flags(source: pathlib.Path) -> list[str]:
        return [f"--huggingface={source}", f"--output_dir={source / 'run'}"]

    def export_flags(source: pathlib.Path) -> list[str]:
        shards = f"--max_shard_bytes={shard_bytes}"
        return [f"--model={source / 'run'}", shards, f"--output_dir={source / 'out'}"]

    imported = converted(import_flags(toy), import_flags(model))
    exported = converted(export_flags(toy), export_flags(model))
    return {
        "model_bytes": sum(tensor.num_bytes for tensor in tensors),
        "largest_tensor_bytes": largest,
        "in": {**imported, "over_largest_tensor": imported["bytes"] / largest},
        "out": {**exported, "over_largest_tensor": exported["bytes"] / largest},
    }


def main() -> None:
    """Measures and prints."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shard_bytes", type=int, default=500_000_000, help="of an exported file")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(pathlib.Path(folder), **vars(flags))
    measurement.report("convert", {"settings": vars(flags), **results})


if __name__ == "__main__":
    main()
