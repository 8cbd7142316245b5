"""Decoding, scoring and soft labels beside eager transformers: one model, alternately.

    salt convert --model=RUN --output_dir=FOLDER
    python benchmarks/beside_transformers.py --model RUN --huggingface FOLDER

Both sides have float32 weights and as many threads as JAX takes. Decoding is greedy, --new tokens
after prompts of --prompt, at each --batch; the other two are of 8 rows of --length tokens. "bytes"
are the least that a step of decoding reads, the weights, and "bandwidth" those over its seconds.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import torch
import transformers
from train_step import make_batch

from salt_jax.distill import chunked_loss, losses, scores
from salt_jax.inference import decoding
from salt_jax.inference.sampling import Sampling
from salt_jax.inference.scoring import scoring_program
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import find_model

ROWS, K, LABELS, TEMPERATURE = 8, 10, 64, 0.25
Sides = dict[str, Callable[[], Any]]


def decoding_sides(
    config: decoder.DecoderConfig, params: Any, theirs: Any, prompts_BxL: np.ndarray, new: int
) -> Sides:
    """New tokens, [B, new], of both."""
    batch, length = prompts_BxL.shape
    choice = decoding.Choice(Sampling(), vocab_size=config.vocab_size or 0, end_ids=(-2,))
    given = (prompts_BxL, jnp.ones_like(prompts_BxL), jnp.arange(batch), jnp.uint32(0))
    limit = jnp.int32(new - 1)
    begin = functools.partial(decoding.begin, config, slots=length + new, choice=choice)
    first = jax.jit(begin).lower(params, *given).compile()
    more = functools.partial(decoding.advance, config, chunk=new - 1, choice=choice)
    others = jax.jit(more, donate_argnums=1)
    others = others.lower(params, first(params, *given)[0], limit).compile()

    def ours() -> np.ndarray:
        state, token_Bx1, _ = first(params, *given)
        return np.concatenate([token_Bx1, others(params, state, limit)[1]], axis=1)

    ids = torch.tensor(prompts_BxL.astype(np.int64))
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}

    def peer() -> np.ndarray:
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return made[:, length:].numpy()

    return {"salt_jax": ours, "transformers": peer, "prompts": lambda: first(params, *given)[1]}


def pass_sides(
    config: decoder.DecoderConfig, params: Any, theirs: Any, length: int, mesh: Any
) -> tuple[Sides, Sides]:
    """A row's score, and each token's most likely ids with their log-probabilities."""
    batch = make_batch((ROWS, length), config.vocab_size or 0, mesh)
    chunk, rules = losses.LossConfig.chunk_tokens, partitioning.DEFAULT_RULES
    score = scoring_program(config, scores.scores_of([K]), mesh, rules, chunk)

    def label(params: Any, batch: Any) -> Any:
        return chunked_loss.top_labels(
            decoder.hidden_states(config, params, batch),
            decoder.head_kernel(params, config),
            batch["targets"],
            batch["loss_weights"],
            config.vocab_size or 0,
            k=LABELS,
            temperature=TEMPERATURE,
            chunk_tokens=chunk,
        )

    compiled = [jax.jit(program).lower(params, batch).compile() for program in (score, label)]
    ids, targets = (torch.tensor(np.array(batch[n], np.int64)) for n in ("inputs", "targets"))

    def peer_score() -> Any:
        logits = theirs(ids).logits
        log_p = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        learnable = (logits.topk(K).indices == targets[..., None]).any(-1)
        return torch.stack([-log_p.mean(-1), learnable.float().mean(-1)])

    def peer_labels() -> Any:
        return (theirs(ids).logits / TEMPERATURE).log_softmax(-1).topk(LABELS)

    sides: list[Sides] = [
        {"salt_jax": functools.partial(ours, params, batch), "transformers": torch.no_grad()(peer)}
        for ours, peer in zip(compiled, (peer_score, peer_labels), strict=True)
    ]
    return sides[0], sides[1]


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of both sides and ours over theirs, by what is done."""
    saved = find_model(flags.model, None, "model")
    config, mesh = saved.config, partitioning.MeshConfig(fsdp=1).make(jax.devices()[:1])
    params = saved.load_params(mesh)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(flags.huggingface, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = 0
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    results: dict[str, Any] = {"parameters": config.num_parameters, "bytes": weights}

    def compared(name: str, sides: Sides, tokens: int) -> dict[str, list[float]]:
        times = measurement.rounds(sides, flags.rounds)
        seconds = measurement.medians(times)
        results[name] = {
            "tokens_per_second": {n: tokens / seconds[n] for n in ("salt_jax", "transformers")},
            "over_transformers": measurement.ratio(times["transformers"], times["salt_jax"]),
        }
        return times

    rng = np.random.default_rng(0)
    with partitioning.partitioned(mesh):
        for batch in flags.batch:
            prompts = rng.integers(0, config.vocab_size, (batch, flags.prompt), np.int32)
            sides = decoding_sides(config, params, theirs, prompts, flags.new)
            same = np.mean(sides["salt_jax"]() == sides["transformers"]())
            times = compared(f"decoding, {batch} rows", sides, batch * flags.new)
            seconds = measurement.medians(times)
            step = (seconds["salt_jax"] - seconds["prompts"]) / (flags.new - 1)
            results[f"decoding, {batch} rows"] |= {
                "same_tokens": same,
                "bandwidth": weights / step,
            }
        for name, sides in zip(
            ("scoring", "soft labels"),
            pass_sides(config, params, theirs, flags.length, mesh),
            strict=True,
        ):
            compared(name, sides, ROWS * flags.length)
    return results


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__, rounds=3)
    parser.add_argument("--model", required=True, help="a run's folder")
    parser.add_argument("--huggingface", required=True, help="the same model, exported")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    for name, default in {"prompt": 64, "new": 32, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    measurement.report("beside_transformers", {"settings": vars(flags), **measure(flags)})


if __name__ == "__main__":
    main()
