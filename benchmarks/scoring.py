"""Scoring over forward-only: what several k and their medians cost besides the model.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --embed_dim 80 --layers 3 --heads 4 --mlp_dim 240 --vocab 4096 \\
        --batch 32 --length 128
    python benchmarks/scoring.py --k 10

One side is the program of `salt score` with all columns of all k; the other is the forward pass
alone, up to the mean -log p of the batch, as for a validation loss (the chunked loss without a
gradient). Model, batch and chunks are the same.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import measurement
from flax import linen as nn
from train_step import make_batch

from salt_jax.distill import chunked_loss, losses, scores
from salt_jax.inference.scoring import scoring_program
from salt_jax.models import decoder
from salt_jax.training import partitioning


def forward_program(config: decoder.DecoderConfig, chunk_tokens: int) -> Any:
    """(params, batch) → mean loss."""

    def program(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        loss, weight, _ = chunked_loss.loss_sums(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            0.0,
            losses.LossConfig(chunk_tokens=chunk_tokens),
            config.vocab_size or 0,
        )
        return loss / weight

    return program


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's results."""
    config = decoder.DecoderConfig(
        embed_dim=flags.embed_dim,
        num_layers=flags.layers,
        num_heads=flags.heads,
        mlp_dim=flags.mlp_dim,
        vocab_size=flags.vocab,
        max_length=flags.length,
        dtype=flags.dtype,
        attention_backend=flags.attention,
    )
    mesh, rules = (
        partitioning.MeshConfig(fsdp=1).make(jax.devices()[:1]),
        partitioning.DEFAULT_RULES,
    )
    params = jax.jit(lambda key: nn.unbox(decoder.init_params(config, key)))(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(flags.dtype), params)
    batch = make_batch((flags.batch, flags.length), flags.vocab, mesh)
    row_scores = scores.scores_of(scores.checked_ks(flags.k))
    score = scoring_program(config, row_scores, mesh, rules, flags.chunk_tokens)
    programs = {"forward": forward_program(config, flags.chunk_tokens), "scoring": score}

    def side(program: Any) -> Any:
        with partitioning.partitioned(mesh, rules):
            compiled = jax.jit(program).lower(params, batch).compile()
        return lambda: compiled(params, batch)

    # The ratio of seconds, forward over scoring, is that of throughput, scoring over forward.
    paired = measurement.paired(
        {name: side(program) for name, program in programs.items()}, flags.rounds
    )
    tokens = flags.batch * flags.length
    rates = {name: tokens / seconds for name, seconds in paired["seconds"].items()}
    return {
        "parameters": config.num_parameters,
        "tokens_per_second": rates,
        "throughput_ratio": paired["ratio"],
        "each_round": paired["each_round"],
    }


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=15)
    for name, default in {
        **{"embed_dim": 256, "layers": 4, "heads": 4, "mlp_dim": 1024, "vocab": 32_000},
        **{"batch": 8, "length": 512, "chunk_tokens": 128},
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10, 20], help="each k scored")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="xla")
    flags = parser.parse_args()
    measurement.report("scoring", {"settings": vars(flags), **measure(flags)})


if __name__ == "__main__":
    main()
