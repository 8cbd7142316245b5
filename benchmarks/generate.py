"""Generation: new tokens/s with a cache and without one, greedy, in one run.

    python benchmarks/generate.py
    python benchmarks/generate.py --embed_dim 2048 --layers 20 --mlp_dim 6144 --heads 16 \\
        --batch 16 --prompt 1024 --new 256 --dtype bfloat16

Cached is what `salt generate` runs: the prompts in one forward pass, then a token at a time.
Uncached repeats the whole forward pass over prompts and new tokens for every new token, with the
head on the last one only, also in one loop on the device. "prefill" is the cached side up to its
first tokens, and "decode" the tokens after those over the remaining time. Both sides should choose
the same tokens, up to rounding ("same_tokens" is their share).
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import numpy as np
from flax import linen as nn

from salt_jax.inference import decoding
from salt_jax.inference.sampling import Sampling
from salt_jax.models import decoder
from salt_jax.training import partitioning


def without_cache(config: decoder.DecoderConfig, new: int, params: Any, prompts_BxL: Any) -> Any:
    """The new tokens, [B, new], with a forward pass over all tokens for each."""
    batch, length = prompts_BxL.shape
    positions_BxS = jnp.tile(jnp.arange(length + new)[None], (batch, 1))

    def one_more(end: jax.Array, tokens_BxS: jax.Array) -> jax.Array:
        row = {
            "inputs": tokens_BxS,
            "segment_ids": (positions_BxS < end).astype(jnp.int32),
            "positions": positions_BxS,
        }
        hidden_BxSxD = decoder.hidden_states(config, params, row)
        last_Bx1xD = jax.lax.dynamic_slice_in_dim(hidden_BxSxD, end - 1, 1, axis=1)
        logits_Bx1xV = decoder.logits(last_Bx1xD, decoder.head_kernel(params, config), config)
        token_B = jnp.argmax(logits_Bx1xV[:, 0, : config.vocab_size], axis=-1).astype(jnp.int32)
        return jax.lax.dynamic_update_index_in_dim(tokens_BxS, token_B, end, axis=1)

    tokens_BxS = jnp.pad(prompts_BxL, ((0, 0), (0, new)))
    return jax.lax.fori_loop(length, length + new, one_more, tokens_BxS)[:, length:]


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's results."""
    config = decoder.DecoderConfig(
        embed_dim=flags.embed_dim,
        num_layers=flags.layers,
        num_heads=flags.heads,
        mlp_dim=flags.mlp_dim,
        vocab_size=flags.vocab,
        max_length=flags.prompt + flags.new,
        dtype=flags.dtype,
    )
    mesh = partitioning.MeshConfig(fsdp=1).make(jax.devices()[:1])
    params = jax.jit(lambda key: nn.unbox(decoder.init_params(config, key)))(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(flags.dtype), params)
    shape = (flags.batch, flags.prompt)
    prompts_BxL = jax.random.randint(jax.random.key(1), shape, 0, flags.vocab)
    batch = (prompts_BxL, jnp.ones_like(prompts_BxL), jnp.arange(flags.batch), jnp.uint32(0))
    # No id ends a row.
    choice = decoding.Choice(Sampling(), vocab_size=flags.vocab, end_ids=(decoding.NO_TOKEN - 1,))
    slots = flags.prompt + flags.new
    with partitioning.partitioned(mesh):
        begin = jax.jit(functools.partial(decoding.begin, config, slots=slots, choice=choice))
        begin = begin.lower(params, *batch).compile()
        advance = functools.partial(decoding.advance, config, chunk=flags.new, choice=choice)
        limit = jnp.int32(flags.new - 1)
        advance = jax.jit(advance, donate_argnums=1)
        advance = advance.lower(params, begin(params, *batch)[0], limit).compile()
        uncached = jax.jit(functools.partial(without_cache, config, flags.new))
        uncached = uncached.lower(params, prompts_BxL).compile()

    def cached() -> jax.Array:
        state, first_Bx1, _ = begin(params, *batch)
        _, tokens_BxC, _ = advance(params, state, limit)
        return jnp.concatenate([first_Bx1, tokens_BxC[:, :-1]], axis=1)

    sides = {
        "uncached": lambda: uncached(params, prompts_BxL),
        "cached": cached,
        "prefill": lambda: begin(params, *batch)[1],
    }
    times = measurement.rounds(sides, flags.rounds)
    seconds = measurement.medians(times)
    new_tokens = flags.batch * flags.new
    decode_seconds = seconds["cached"] - seconds["prefill"]
    return {
        "parameters": config.num_parameters,
        "seconds": seconds,
        "new_tokens_per_second": {n: new_tokens / seconds[n] for n in ("uncached", "cached")},
        "prefill_tokens_per_second": flags.batch * flags.prompt / seconds["prefill"],
        "decode_tokens_per_second": (new_tokens - flags.batch) / decode_seconds,
        "cached_over_uncached": measurement.ratio(times["uncached"], times["cached"]),
        "same_tokens": float(np.mean(np.asarray(sides["uncached"]()) == np.asarray(cached()))),
    }


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=3)
    for name, default in {
        **{"embed_dim": 256, "layers": 4, "heads": 4, "mlp_dim": 1024, "vocab": 32_000},
        **{"batch": 4, "prompt": 192, "new": 64},
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    measurement.report("generate", {"settings": vars(flags), **measure(flags)})


if __name__ == "__main__":
    main()
