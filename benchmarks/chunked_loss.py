"""The chunked loss over whole logits: temporary memory, and time of value and gradients.

    python benchmarks/chunked_loss.py                       V of 8K, 32K, 128K and 256K
    python benchmarks/chunked_loss.py --vocab 32768 --chunk_tokens 64 128 256

Both sides: 2,048 tokens, student width 512, teacher width 384, SALT's loss (ω 2/3, τ 1/4) and its
gradients by the student's hidden states and head. The whole-logits side is the straightforward
implementation of `losses.py`'s formulas with jax.nn and autodiff. Memory is XLA's memory_analysis
of the compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement

from salt_jax.distill import chunked_loss, losses

TOKENS, STUDENT_WIDTH, TEACHER_WIDTH, LENGTH = 2048, 512, 384, 256
OMEGA = 2 / 3


def token_values(
    student_BxLxV: jax.Array, teacher_BxLxV: Any, targets_BxL: jax.Array, config: losses.LossConfig
) -> dict[str, jax.Array]:
    """The values of `token_losses.token_losses` for forward KL."""

    def at_target(values_BxLxV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]

    log_p_BxLxV = jax.nn.log_softmax(student_BxLxV)
    largest_BxL = jnp.max(student_BxLxV, axis=-1)
    hard_BxL = -at_target(log_p_BxLxV)
    values = {"hard": hard_BxL, "correct": at_target(student_BxLxV) >= largest_BxL}
    values["loss"] = hard_BxL
    if teacher_BxLxV is not None:
        log_q_BxLxV = jax.nn.log_softmax(teacher_BxLxV / config.teacher_temperature)
        values["soft"] = -jnp.sum(jnp.exp(log_q_BxLxV) * log_p_BxLxV, axis=-1)
        values["loss"] = (1.0 - OMEGA) * hard_BxL + OMEGA * values["soft"]
        log_z_BxL = jax.nn.logsumexp(teacher_BxLxV, axis=-1)
        values["teacher_hard"] = log_z_BxL - at_target(teacher_BxLxV)
        mine_BxLxV = student_BxLxV >= largest_BxL[..., None]
        theirs_BxLxV = teacher_BxLxV >= jnp.max(teacher_BxLxV, axis=-1, keepdims=True)
        values["agreement"] = jnp.any(mine_BxLxV & theirs_BxLxV, axis=-1)
    return values


def whole_logits(config: losses.LossConfig, vocab: int, hidden: Any, head: Any, rest: Any) -> Any:
    targets_BxL, weights_BxL, teacher_hidden, teacher_head = rest
    product = functools.partial(jnp.einsum, "bld,vd->blv", preferred_element_type=jnp.float32)
    teacher = None if teacher_head is None else product(teacher_hidden, teacher_head)
    tokens = token_values(product(hidden, head), teacher, targets_BxL, config)
    sums = {name: jnp.sum(weights_BxL * value) for name, value in tokens.items()}
    del vocab
    return sums.pop("loss"), sums


def chunked(config: losses.LossConfig, vocab: int, hidden: Any, head: Any, rest: Any) -> Any:
    targets_BxL, weights_BxL, teacher_hidden, teacher_head = rest
    loss, _, metrics = chunked_loss.loss_sums(
        hidden,
        head,
        targets_BxL,
        weights_BxL,
        OMEGA,
        config,
        vocab,
        teacher_hidden_BxLxD=teacher_hidden,
        teacher_head_VxD=teacher_head,
    )
    return loss, metrics


def program(sums: Callable[..., Any], config: losses.LossConfig, vocab: int, arguments: Any) -> Any:
    loss = functools.partial(sums, config, vocab)
    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradients).lower(*arguments).compile()


def make_arguments(vocab: int, dtype: str, teacher: bool) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    batch = TOKENS // LENGTH
    hidden, head = normal(batch, LENGTH, STUDENT_WIDTH), normal(vocab, STUDENT_WIDTH) / 20
    targets = jax.random.randint(next(keys), (batch, LENGTH), 0, vocab)
    taught = normal(batch, LENGTH, TEACHER_WIDTH), normal(vocab, TEACHER_WIDTH) / 20
    weights = jnp.ones((batch, LENGTH), jnp.float32)
    return hidden, head, (targets, weights, *(taught if teacher else (None, None)))


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--chunk_tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--no_teacher", action="store_true", help="plain cross-entropy")
    parser.add_argument("--memory_only", action="store_true", help="compile, don't run")
    flags = parser.parse_args()
    results = []
    for vocab in flags.vocab:
        arguments = make_arguments(vocab, flags.dtype, not flags.no_teacher)
        config = losses.LossConfig()
        whole = program(whole_logits, config, vocab, arguments)
        for tokens in flags.chunk_tokens:
            in_chunks = dataclasses.replace(config, chunk_tokens=tokens)
            ours = program(chunked, in_chunks, vocab, arguments)
            bytes_of = lambda compiled: compiled.memory_analysis().temp_size_in_bytes  # noqa: E731
            line: dict[str, Any] = {
                "vocab": vocab,
                "chunk_tokens": tokens,
                "temporary_bytes": {"chunked": bytes_of(ours), "whole": bytes_of(whole)},
                "memory_ratio": bytes_of(ours) / bytes_of(whole),
            }
            if not flags.memory_only:
                sides = {
                    "chunked": functools.partial(ours, *arguments),
                    "whole": functools.partial(whole, *arguments),
                }
                line["time"] = measurement.paired(sides, flags.rounds)
            results.append(line)
    measurement.report("chunked_loss", {"lines": results})


if __name__ == "__main__":
    main()
