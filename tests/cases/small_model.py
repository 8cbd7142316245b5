"""A model of a few steps, for cases that need any."""

import pathlib

from salt_jax.data.packed_cache import PackedCache

TRAIN = [
    *("train", "--gin_file=runs/pretrain.gin", "--gin_file=methods/baseline.gin", "--steps=4"),
    *("--batch_size=8", "--gin.LEARNING_RATE=1e-3", "--gin.WARMUP_STEPS=2", "--log_every=1"),
    *(f"--gin.decoder.DecoderConfig.{size}" for size in ("mlp_dim=32", "embed_dim=16")),
    *(f"--gin.decoder.DecoderConfig.{size}" for size in ("num_layers=1", "num_heads=2")),
    "--compilation_cache=",
]


def training(cache: PackedCache | pathlib.Path, output: pathlib.Path) -> list[str]:
    """The command that makes it."""
    path = cache.path if isinstance(cache, PackedCache) else cache
    return [*TRAIN, f"--cache={path}", f"--output_dir={output}"]
