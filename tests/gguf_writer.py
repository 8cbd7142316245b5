"""Writes tiny GGUF files: a Llama of random values with a tokenizer of bytes."""

import json
import pathlib
from typing import Any

import numpy as np

# Where the 16-bit scales of a block of 256 values are; the library doesn't quantize to these.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
LAYERS, WIDTH, HEADS, KV_HEADS, IDS = 2, 256, 4, 2, 300
METADATA: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": WIDTH // HEADS,
    "llama.vocab_size": IDS,
}


def byte_tokenizer(file: pathlib.Path) -> dict[str, Any]:
    """The metadata of a tokenizer.json whose end of document has the id 0."""
    model = json.loads(file.read_text())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(model["vocab"]) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def write_gguf(
    path: pathlib.Path,
    kind: str,
    metadata: dict[str, Any],
    tied: bool = False,
    architecture: str = "llama",
    more: tuple[str, ...] = (),
) -> None:
    """A file whose matrices are of a type ("Q4_K"); `metadata` goes over METADATA, and None in it
    leaves a key out; `more` names further tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**METADATA, **metadata}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    kv_rows = WIDTH // HEADS * KV_HEADS
    matrices = {"token_embd": IDS} | ({} if tied else {"output": IDS})
    norms = ["output_norm"]
    for layer in range(LAYERS):
        rows = {"attn_q": WIDTH, "attn_k": kv_rows, "attn_v": kv_rows, "attn_output": WIDTH}
        rows |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), WIDTH)
        matrices |= {f"blk.{layer}.{name}": size for name, size in rows.items()}
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    rng = np.random.default_rng(0)
    for name, rows in matrices.items():
        data, raw_dtype = _matrix(rng, rows, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=raw_dtype)
    for name in (*norms, *more):
        writer.add_tensor(f"{name}.weight", 1 + 0.1 * rng.standard_normal(WIDTH).astype("f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrix(rng: np.random.Generator, rows: int, kind: str) -> tuple[np.ndarray, Any]:
    import gguf

    dtype = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES:
        values = 0.1 * rng.standard_normal((rows, WIDTH)).astype("f4")
        if kind == "I8":
            return values.astype("i1"), dtype
        return gguf.quantize(values, dtype), dtype
    _, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
    data = rng.integers(0, 256, (rows, block_bytes), np.uint8)
    for place in _SCALES[kind]:
        scale = 5e-5 if kind == "Q6_K" else 2e-4
        data[:, place : place + 2] = np.array([scale], "f2").view("u1")
    return data, dtype
